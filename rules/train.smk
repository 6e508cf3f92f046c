# GRPO. A run's folder is not an output, so that a failed job does not delete a half-trained run. `open_run` chooses it by
# settings and inputs: the same training continues its folder, another one starts a new folder.


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
        gpu=gpus("train"),
        gpu_host_gib=gpu_host_gib("train"),
        data_first=1,
        mem_mb=host_memory_mb("train"),
        runtime=7 * 24 * 60,
    params:
        key=key("train"),
        gpus=untracked(gpus("train")),
        job=job_file,
        changes=changes("train"),
        processes=untracked(training_processes),
        launch=untracked(training_launch),
        runs=subpath(output[0], parent=True),
        validation=lambda wildcards, input: (
            f"--validation {quote(str(input.validation))}" if input.validation else ""
        ),
    message:
        "{wildcards.model}: train with GRPO{params.changes}"
    shell:
        'begin {log:q}; {{ outlive_signals; work=$(python "$SCRIPTS"/open_run.py --job {params.job:q} --runs {params.runs:q} --manifest {output:q}); [ -e {output:q} ] ||'
        ' OMP_NUM_THREADS=$(share {threads} {params.processes}) python -P -m milepost.launch.with_gpus {params.gpus} {params.launch} "$SCRIPTS"/train.py --job {params.job:q} --hub {input.hub:q} --weights {input.weights:q}'
        ' --data {input.data:q} {params.validation} --work "$work" --manifest {output:q}; }} |& logged'
