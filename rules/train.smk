# GRPO. The work folder is no output, so a failed job never takes a half-trained run with it; its name tells the run's
# settings apart, so that the same training goes on and another one starts anew.


rule train:
    input:
        hub=f"{RESULTS}/{{model}}/download.json",
        weights=f"{RESULTS}/{{model}}/convert.json",
        data=training_data,
        validation=validation_data,
    output:
        f"{RESULTS}/{{model}}/grpo/{settings.run}/train.json",
    log:
        f"{RESULTS}/logs/{{model}}/train-{settings.run}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{model}}/train-{settings.run}.tsv"
    threads: cores
    resources:
        gpu=gpus,
        gpu_host_gib=gpu_host_gib,
        data_first=1,
        mem_mb=host_memory_mb,
        runtime=7 * 24 * 60,
    params:
        key=key("train"),
        gpus=untracked(gpus),
        job=job_file,
        changes=changes("train"),
        processes=untracked(training_processes),
        launch=untracked(training_launch),
        work=work_folder,
        validation=lambda wildcards, input: (
            f"--validation {quote(str(input.validation))}" if input.validation else ""
        ),
    message:
        "{wildcards.model}: train with GRPO{params.changes}"
    shell:
        "begin {log:q}; OMP_NUM_THREADS=$(share {threads} {params.processes}) python -m with_gpus {params.gpus} {params.launch} train --job {params.job:q} --hub {input.hub:q} --weights {input.weights:q}"
        " --data {input.data:q} {params.validation} --work {params.work:q} --manifest {output:q} |& logged"
