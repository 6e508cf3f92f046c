# Milepost: GRPO training of Qwen3.5, from the Hub to a trained and evaluated checkpoint.
from snakemake.utils import min_version

min_version("9.27")


# First, since it says better than Snakemake what is wrong with the configuration.
include: "rules/common.smk"


configfile: f"{workflow.basedir}/config/config.yaml"


include: "rules/download.smk"
include: "rules/convert.smk"
include: "rules/train.smk"
include: "rules/evaluate.smk"
include: "rules/report.smk"
include: "rules/targets.smk"


# Here, because Snakemake forgets the default target of a file that is included.
rule all:
    """Everything, ending with the report (the default target)."""
    default_target: True
    input:
        f"{RESULTS}/report.html",
        [f"{RESULTS}/{model}/hf/{settings.run}.json" for model in settings.listed],


onstart:
    # Before anything runs: is there what the jobs that are about to run need, here or where they are sent?
    if not workflow.touch:
        waiting = [*workflow.dag.needrun_jobs()]
        complain(
            check_jobs,
            [(job.rule.name, dict(job.wildcards)) for job in waiting],
            settings,
            provenance,
            None if workflow.local_exec else partitions(waiting),
        )
