# Milepost: GRPO training of Qwen3.5, from the Hub to a trained and evaluated checkpoint.
from snakemake.utils import min_version

min_version("9.27")


configfile: f"{workflow.basedir}/config/config.yaml"


include: "rules/common.smk"
include: "rules/download.smk"
include: "rules/convert.smk"
include: "rules/train.smk"
include: "rules/evaluate.smk"
include: "rules/report.smk"
include: "rules/targets.smk"


onstart:
    # Before anything runs: does this machine have what the jobs that are about to run need?
    if workflow.local_exec and not workflow.touch:
        complain(
            check_jobs,
            [
                (job.rule.name, dict(job.wildcards))
                for job in workflow.dag.needrun_jobs()
            ],
            settings,
            provenance,
        )
