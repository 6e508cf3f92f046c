# The targets that users call: for each stage, one per model and one for all models that config.yaml lists.

STAGES = {
    "download": "fetch the starting weights and the problem sets",
    "convert": "convert the starting weights to Megatron torch_dist",
    "train": "train with GRPO",
    "evaluate": "evaluate the base weights alone, without any training",
    "export": "export the trained weights in the Hub's format",
    "eval": "evaluate the base and the trained weights",
}


rule report:
    """Write the tables, the plots and the report over the listed models."""
    input:
        f"{RESULTS}/report.html",


rule compare:
    """Compare the pairs of weights that `compare` names, and make nothing else (--config compare=...)."""
    input:
        f"{RESULTS}/tables/comparison.md",


rule preflight:
    """Print what the listed models need and whether this machine has it, without starting anything."""
    log:
        f"{RESULTS}/logs/preflight.log",
    localrule: True
    run:
        found = table(settings)
        Path(log[0]).write_text(f"{found}\n")
        print(found)


rule check_reward:
    """Grade the answers of a file (--config answers=...) by the rewards of the listed models."""
    log:
        f"{RESULTS}/logs/check_reward.log",
    localrule: True
    params:
        job=f"{RESULTS}/jobs/check_reward.json",
    shell:
        'begin {log:q}; python "$SCRIPTS"/check_reward.py --job {params.job:q} |& logged'


rule progress:
    """Write results/progress.html on the trainings that run or are finished, also while they run."""
    log:
        f"{RESULTS}/logs/progress.log",
    localrule: True
    params:
        job=f"{RESULTS}/jobs/progress.json",
        results=RESULTS,
        html=f"{RESULTS}/progress.html",
    message:
        "write the page on trainings in progress"
    shell:
        'begin {log:q}; python "$SCRIPTS"/make_progress.py --job {params.job:q} --results {params.results:q}'
        " --html {params.html:q} |& logged"


for stage, purpose in STAGES.items():
    for model in [*settings.models, *settings.faults]:

        rule:
            name:
                f"{stage}_{model}"
            input:
                results_of(stage, model),

        workflow.get_rule(f"{stage}_{model}").docstring = f"{model}: {purpose}."

    rule:
        name:
            f"{stage}_all"
        input:
            [results_of(stage, model) for model in settings.listed],

    workflow.get_rule(f"{stage}_all").docstring = f"Every listed model: {purpose}."
