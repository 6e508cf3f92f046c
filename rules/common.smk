# The validated configuration, and the functions that the rules use.
import atexit
import functools
import os
import sys
from pathlib import Path
from shlex import quote

from snakemake.logging import logger
from snakemake.persistence import ParamsChange
from snakemake_interface_logger_plugins.common import LogEvent

BASE = Path(str(workflow.current_basedir)).parent
SCRIPTS = BASE / "workflow_scripts"
sys.path.insert(0, str(SCRIPTS))

from milepost.common.errors import UserError
from milepost.common.failed_jobs import FailedJobs
from milepost.common.files import write_json
from milepost.common.working_folder import claim, keep_locks_of_others
from milepost.configuration import layout
from milepost.configuration.cgroups import usable_cores, usable_memory
from milepost.configuration.compared import check_compared, check_shown, no_such_run
from milepost.configuration.early import check_inputs, mistyped
from milepost.configuration.gpus import visible_gpus
from milepost.configuration.layers import user_layers
from milepost.configuration.loading import load
from milepost.configuration.memory import asked_gib
from milepost.configuration.preflight import check_jobs, table
from milepost.configuration.provenance import Provenance
from milepost.configuration.weights import BASE as BASE_WEIGHTS
from milepost.configuration.weights import WEIGHTS, checkpoint_of, run_of


def complain(function, *arguments):
    """Call a function; a `UserError` ends Snakemake with one line."""
    try:
        return function(*arguments)
    except UserError as error:
        sys.exit(f"error: {error}")


# Snakemake 9.27's `--list-changes params` lists every result with recorded params, changed or not.
ParamsChange.__iter__ = lambda change: iter(change.files if change else ())

# Not in jobs that an executor sends elsewhere: they belong to the run that sends them.
if workflow.is_main_process:
    claimed = claim(Path(".snakemake"))
    keep_locks_of_others()
    failed_jobs = FailedJobs(workflow)
    logger.addFilter(failed_jobs)
    atexit.register(failed_jobs.say)

settings = complain(
    load,
    BASE / "config/config.yaml",
    BASE / "config/models",
    complain(
        user_layers,
        [Path(file) for file in workflow.config_settings.configfiles or ()],
        workflow.config_settings.config or {},
        Path(workflow.workdir_init),
    ),
    BASE / "config/local.yaml",
)
provenance = Provenance(settings, SCRIPTS)
RESULTS = settings.results

# Jobs use the interpreter that runs Snakemake, and the processes they start can import this project's package.
if ":" in f"{SCRIPTS}{sys.executable}":
    sys.exit(
        f"error: {BASE}: PATH and PYTHONPATH can't hold a folder with a colon in its name: move the clone"
    )
prefix = (
    "set -euo pipefail; "
    f"source {quote(str(BASE / 'rules/job.sh'))}; "
    f"export SCRIPTS={quote(str(SCRIPTS))} PATH={quote(str(Path(sys.executable).parent))}:$PATH; "
    "export PYTHONPATH=$SCRIPTS PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false "
    "THP_MEM_ALLOC_ENABLE=1; "  # torch uses huge pages: Adam's states are allocated twice as fast
)
shell.prefix(prefix.replace("{", "{{").replace("}", "}}"))  # Snakemake formats it

# Resources that jobs share under any profile. A problem set takes all of data_first and a training a little, so that no
# training starts before all problem sets are known to be good. On this machine jobs share its GPUs and their host
# memory, and with_gpus.py chooses each job's GPUs; elsewhere the executor does.
ALL_DATA_FIRST = 1000
if workflow.is_main_process and not workflow.output_settings.dryrun:
    capacity = {"data_first": ALL_DATA_FIRST}
    if workflow.resource_settings.nodes is None:
        capacity["gpu"] = len(visible_gpus()) or 1
        capacity["gpu_host_gib"] = usable_memory() >> 30
    for resource, available in capacity.items():
        if resource not in workflow.global_resources:
            workflow.register_resource(resource, available)

# Compiled kernels are cached between runs, with the results unless the user sets another place.
for variable in (
    "TRITON_CACHE_DIR",
    "TILELANG_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "FLASHINFER_WORKSPACE_BASE",
    "TVM_FFI_CACHE_DIR",  # SGLang's own
):
    os.environ.setdefault(
        variable,
        str(Path(RESULTS, "caches", variable.split("_")[0].lower()).absolute()),
    )


wildcard_constraints:
    model="|".join([*settings.models, *settings.faults]),
    dataset="|".join(settings.datasets),
    weights=WEIGHTS,


def of_model(wildcards):
    """The settings of a job's model; an invalid model file is reported here, when that model is requested."""
    if wildcards.model in settings.faults:
        sys.exit(f"error: {settings.faults[wildcards.model]}")
    return settings.models[wildcards.model]


# ---- what a result depends on (milepost/configuration/provenance.py) ---------------------------------------------


def which(wildcards):
    """The wildcards that identify a job's result for `Provenance`; an invalid model file is reported here."""
    if "model" in wildcards.keys():
        of_model(wildcards)
    return dict(wildcards)


def key(stage):
    """The only param whose change reruns a job."""
    return lambda wildcards: provenance.key(stage, **which(wildcards))


def untracked(function):
    """A param whose change reruns nothing: Snakemake ignores params that depend on the output."""
    return lambda wildcards, output: function(wildcards)


def job_file(wildcards, output):
    """The file of a job's settings: below jobs/, named after its first output."""
    return (
        Path(RESULTS, "jobs", Path(output[0]).relative_to(RESULTS))
        .with_suffix(".json")
        .as_posix()
    )


def stages_due():
    """(job, stage, the result's wildcards) of every job that is about to make a result."""
    for job in workflow.dag.needrun_jobs():
        if "job" in job.params.keys():
            stage = {"page": "report"}.get(job.rule.name, job.rule.name)
            yield job, stage, which(job.wildcards)


def write_job_files():
    """Write each job's settings file, of which `key` is the digest; its manifest keeps a copy."""
    for job, stage, result in stages_due():
        write_json(job.params.job, provenance.job(stage, **result))


def changes(stage):
    """For a job's message: what has changed since the result was made, in brackets."""

    def of(wildcards, output):
        found = provenance.why(stage, **which(wildcards))
        return f" ({found})" if found else ""

    return of


# ---- before the first job ----------------------------------------------------------------------------------------


def due():
    """(rule, wildcards) of every job that is about to run."""
    return [(job.rule.name, dict(job.wildcards)) for job in workflow.dag.needrun_jobs()]


@functools.cache
def check_before_the_first_job():
    complain(check_inputs, due(), settings, provenance)


def tell_what_touch_hides():
    """Say why each stale result is stale, before `--touch` marks it as fresh."""
    for _, stage, result in stages_due():
        if why := provenance.why(stage, **result):
            print(
                f"note: --touch passes over what would be done again: {stage} {' '.join(result.values())} ({why})",
                file=sys.stderr,
            )


def watch(record):
    """A filter of Snakemake's log, to act on two events that have no handler."""
    event = getattr(record, "event", None)
    if (
        event == LogEvent.RUN_INFO and workflow.dryrun
    ):  # a dry run knows its jobs now; onstart runs only in real runs
        check_before_the_first_job()
    if event == LogEvent.ERROR and record.exception == "MissingRuleException":
        rules = [rule.name for rule in workflow.rules]
        if line := mistyped(workflow.dag_settings.targets, rules, record.getMessage()):
            sys.exit(f"error: {line}")
    return True


if workflow.is_main_process:
    logger.addFilter(watch)


# ---- a job's resources -------------------------------------------------------------------------------------------


def gpus(stage):
    return lambda wildcards: layout.gpus(of_model(wildcards), stage)


def gpu_host_gib(stage):
    """Host memory of a job with GPUs, in GiB."""
    return lambda wildcards: (
        asked_gib(of_model(wildcards), stage) if gpus(stage)(wildcards) else 0
    )


def cores(wildcards):
    """The configured cores; for local jobs no more than the container's CPU limit, which Snakemake does not know."""
    wanted = of_model(wildcards).hardware.cores
    return min(wanted, usable_cores()) if workflow.local_exec else wanted


def host_memory_mb(stage):
    return lambda wildcards: asked_gib(of_model(wildcards), stage) * 1024


def partitions(jobs):
    """Rule -> the Slurm partition of its jobs."""
    return {job.rule.name: job.resources.get("slurm_partition") for job in jobs}


def launched(by, count):
    """The command that starts a script: ``python``, or the pipeline's torchrun with ``count`` processes."""
    if by == "python":
        return "python"
    return (
        f"python -P -m milepost.launch.torchrun --standalone --nproc-per-node={count}"
    )


def training_processes(wildcards):
    return layout.processes(of_model(wildcards).hardware)


def training_launch(wildcards):
    count = training_processes(wildcards)
    return launched("torchrun" if count > 1 else "python", count)


def conversion_launch(wildcards):
    conversion = of_model(wildcards).conversion
    return launched(conversion.launcher, conversion.processes)


# ---- paths -------------------------------------------------------------------------------------------------------


def training_data(wildcards):
    return [
        f"{RESULTS}/data/{name}.json" for name in of_model(wildcards).training.datasets
    ]


def validation_data(wildcards):
    validation = of_model(wildcards).validation
    return [f"{RESULTS}/data/{validation.dataset}.json"] if validation.interval else []


def training_of(wildcards):
    """The training that made the weights to export: of the run that is trained, or of any that is finished."""
    run = run_of(wildcards.weights)
    if not settings.has_run(wildcards.model, run):
        sys.exit(f"error: {no_such_run(settings, run, wildcards.model)}")
    return f"{RESULTS}/{wildcards.model}/grpo/{run}/train.json"


def evaluated_model(wildcards):
    """The weights to evaluate: the download, or the export of a run."""
    if wildcards.weights == BASE_WEIGHTS:
        return f"{RESULTS}/{wildcards.model}/download.json"
    return f"{RESULTS}/{wildcards.model}/hf/{wildcards.weights}.json"


def scores(*evaluations):
    """The files of scores: (model, dataset, weights) of each."""
    return [
        f"{RESULTS}/{model}/eval/{dataset}/{weights}.json"
        for model, dataset, weights in evaluations
    ]


def scores_of(model, *weights):
    """The scores of a model's weights on every problem set that it is evaluated on."""
    datasets = settings.models[model].evaluation.datasets
    return scores(*((model, dataset, name) for dataset in datasets for name in weights))


def sources(model):
    """The starting weights and all problem sets that a model is trained, validated and evaluated on."""
    datasets = sorted(settings.models[model].problem_sets)
    return [
        f"{RESULTS}/{model}/download.json",
        *(f"{RESULTS}/data/{dataset}.json" for dataset in datasets),
    ]


def results_of(stage, model):
    """The manifests that make up one stage of one model."""
    if model in settings.faults:
        return lambda wildcards: sys.exit(f"error: {settings.faults[model]}")
    return {
        "download": sources(model),
        "convert": [f"{RESULTS}/{model}/convert.json"],
        "train": [f"{RESULTS}/{model}/grpo/{settings.run}/train.json"],
        "export": [f"{RESULTS}/{model}/hf/{settings.trained(model)}.json"],
        "evaluate": scores_of(model, BASE_WEIGHTS),
        "eval": scores_of(model, BASE_WEIGHTS, settings.trained(model)),
    }[stage]


# ---- what tables, plots and report show ---------------------------------------------------------------------------


def shown_scores(wildcards):
    """All scores that tables, plots and report show."""
    complain(check_shown, settings)
    return scores(*settings.evaluations)


def compared_scores(wildcards):
    """Those that the target `compare` asks for."""
    complain(check_compared, settings)
    return scores(*settings.compared)


def trainings(runs):
    return [f"{RESULTS}/{model}/grpo/{run}/train.json" for model, run in runs]


def shown_sources():
    """The manifests of the starting weights and the problem sets of what the report shows."""
    of_scores = {
        f"{RESULTS}/{path}.json"
        for model, dataset, _ in settings.evaluations
        for path in (f"{model}/download", f"data/{dataset}")
    }
    trained = [model for model, run in settings.trainings if run == settings.run]
    return sorted(of_scores.union(*map(sources, trained)))
