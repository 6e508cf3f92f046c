# The checked configuration, where results lie, and the functions that the rules call.
import json
import os
import sys
from pathlib import Path
from shlex import quote

sys.path.insert(0, f"{workflow.basedir}/workflow_scripts")

from common.errors import UserError
from common.working_folder import claim
from configuration import staleness
from configuration.cgroups import usable_cores
from configuration.layout import processes
from configuration.loading import load, user_settings
from configuration.preflight import check_jobs, table
from configuration.provenance import Provenance


def complain(function, *arguments):
    """Call a function; a mistake of the user's ends Snakemake with one line."""
    try:
        return function(*arguments)
    except UserError as error:
        sys.exit(f"error: {error}")


# Jobs that an executor sends elsewhere belong to the run that sends them.
if not workflow.remote_exec and not workflow.subprocess_exec:
    claimed = claim(Path(".snakemake"))

BASE = Path(workflow.basedir)
settings = complain(
    load,
    BASE / "config/config.yaml",
    BASE / "config/models",
    complain(
        user_settings,
        [Path(file) for file in workflow.config_settings.configfiles or ()],
        workflow.config_settings.config or {},
    ),
)
provenance = Provenance(settings, BASE / "workflow_scripts")
RESULTS = settings.results

# Jobs run with the interpreter that runs Snakemake and see no other modules than this project's.
shell.prefix(
    "set -euo pipefail; "
    f"source '{BASE}/rules/job.sh'; "
    f"export PATH='{Path(sys.executable).parent}':$PATH PYTHONPATH='{BASE}/workflow_scripts' "
    "PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false "
    "THP_MEM_ALLOC_ENABLE=1; "  # torch takes memory in large pages: Adam's states are there twice as fast
)

# Compiled kernels are kept from run to run, beside the results unless the user says where.
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
    weights=f"base|{settings.run}",


def of_model(wildcards):
    """The settings of a job's model; a model whose own file is wrong says so here, when it is asked for."""
    if wildcards.model in settings.faults:
        sys.exit(f"error: {settings.faults[wildcards.model]}")
    return settings.models[wildcards.model]


# ---- what a result depends on (configuration/provenance.py) ------------------------------------------------------


def which(wildcards):
    """The result that a job makes, for `Provenance`; a model whose own file is wrong says so here."""
    if "model" in wildcards.keys():
        of_model(wildcards)
    return dict(wildcards)


def key(stage):
    """The one param whose change runs a job again. The others ask for the output, so Snakemake does not mind them."""
    return lambda wildcards: provenance.key(stage, **which(wildcards))


def record(stage):
    """What `key` is the digest of: the job takes its settings from it, and its manifest keeps it."""
    return lambda wildcards, output: json.dumps(
        provenance.of(stage, **which(wildcards))
    )


def changes(stage):
    """What has changed since the result was made, in brackets, for a job's message."""

    def of(wildcards, output):
        made, now = Path(output[0]), provenance.of(stage, **which(wildcards))
        if stage == "train":
            found = staleness.of_training(made, now, work_folder(wildcards, output))
        else:
            found = staleness.changes(made, now)
        return f" ({found})" if found else ""

    return of


# ---- what a job takes --------------------------------------------------------------------------------------------


def gpus(wildcards):
    return of_model(wildcards).hardware.gpus


def gpu_node(wildcards):
    """1 for a job with GPUs: a node has room for one, since each takes the first ones that it sees."""
    return min(gpus(wildcards), 1)


def cores(wildcards):
    """As configured, and here no more than a container leaves of the machine's time, of which Snakemake knows nothing."""
    wanted = of_model(wildcards).hardware.cores
    return min(wanted, usable_cores()) if workflow.local_exec else wanted


def host_memory_mb(wildcards):
    return of_model(wildcards).hardware.host_memory_gib * 1024


def partitions(jobs):
    """Rule -> the Slurm partition that its jobs are sent to."""
    return {job.rule.name: job.resources.get("slurm_partition") for job in jobs}


def launched(by, count):
    """How a script is started: alone by ``python``, or by ``torchrun`` as so many processes of this machine."""
    if by == "python":
        return "python -m"
    return f"python -m torchrun --standalone --nproc-per-node={count} -m"


def training_launch(wildcards):
    count = processes(of_model(wildcards).hardware)
    return launched("torchrun" if count > 1 else "python", count)


# ---- where things lie --------------------------------------------------------------------------------------------


def work_folder(wildcards, output):
    """Of a training: the same while its run may go on."""
    return Path(output[0]).parent / provenance.work(wildcards.model)


def training_data(wildcards):
    return f"{RESULTS}/data/{of_model(wildcards).training.dataset}.json"


def validation_data(wildcards):
    validation = of_model(wildcards).validation
    return [f"{RESULTS}/data/{validation.dataset}.json"] if validation.interval else []


def evaluated_model(wildcards):
    """The weights that an evaluation samples: the download, or the export of a run."""
    if wildcards.weights == "base":
        return f"{RESULTS}/{wildcards.model}/download.json"
    return f"{RESULTS}/{wildcards.model}/hf/{wildcards.weights}.json"


def scores(model):
    """The score files of a model: base and trained, on every problem set that it is evaluated on."""
    return expand(
        f"{RESULTS}/{model}/eval/{{dataset}}/{{weights}}.json",
        dataset=settings.models[model].evaluation.datasets,
        weights=["base", settings.run],
    )


def sources(model):
    """The starting weights and all problem sets that a model is trained, validated and evaluated on."""
    used = settings.models[model]
    datasets = {used.training.dataset, *used.evaluation.datasets}
    if used.validation.interval:
        datasets.add(used.validation.dataset)
    return [
        f"{RESULTS}/{model}/download.json",
        *(f"{RESULTS}/data/{dataset}.json" for dataset in sorted(datasets)),
    ]


def results_of(stage, model):
    """The manifests that stand for one stage of one model."""
    if model in settings.faults:
        return lambda wildcards: sys.exit(f"error: {settings.faults[model]}")
    return {
        "download": sources(model),
        "convert": [f"{RESULTS}/{model}/convert.json"],
        "train": [f"{RESULTS}/{model}/grpo/{settings.run}/train.json"],
        "export": [f"{RESULTS}/{model}/hf/{settings.run}.json"],
        "eval": scores(model),
    }[stage]
