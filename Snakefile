# Milepost: GRPO training of Qwen3.5, from the Hub to a trained and evaluated checkpoint.
from snakemake.utils import min_version

min_version("9.27")


# First, since it says better than Snakemake what is wrong with the configuration.
include: "rules/common.smk"


configfile: f"{BASE}/config/config.yaml"


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


# Only the run that a user starts comes here, not those that an executor starts for single jobs on other nodes.
onstart:
    if not workflow.touch:
        check_before_the_first_job()
        # Is there what the jobs need, here or where they are sent?
        sent = (
            None if workflow.local_exec else partitions(workflow.dag.needrun_jobs())
        )
        complain(check_jobs, due(), settings, provenance, sent)
        failed_jobs.forget(workflow.dag.needrun_jobs())
        write_job_files()
    else:
        tell_what_touch_hides()
