# Milepost: GRPO training of Qwen3.5, from the Hub to a trained and evaluated checkpoint.
from snakemake.utils import min_version

min_version("9.27")


# First, because its messages about a wrong configuration are better than Snakemake's.
include: "rules/common.smk"


configfile: f"{BASE}/config/config.yaml"


include: "rules/download.smk"
include: "rules/convert.smk"
include: "rules/train.smk"
include: "rules/evaluate.smk"
include: "rules/report.smk"
include: "rules/targets.smk"


# Here, because Snakemake ignores the default target of an included file.
rule all:
    """Everything, ending with the report (the default target)."""
    default_target: True
    input:
        f"{RESULTS}/report.html",
        [results_of("export", model) for model in settings.listed],


# Runs once, in the process that the user starts, not in an executor's processes for single jobs.
onstart:
    if not workflow.touch:
        check_before_the_first_job()
        # Check that what the jobs need is there, on this machine or on the nodes.
        sent = (
            None if workflow.local_exec else partitions(workflow.dag.needrun_jobs())
        )
        complain(check_jobs, due(), settings, provenance, sent)
        failed_jobs.forget(workflow.dag.needrun_jobs())
        write_job_files()
    else:
        tell_what_touch_hides()
