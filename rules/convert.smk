# Hub format -> Megatron torch_dist, and a trained model back.


rule convert:
    input:
        hub=f"{RESULTS}/{{model}}/download.json",
    output:
        f"{RESULTS}/{{model}}/convert.json",
    log:
        f"{RESULTS}/logs/{{model}}/convert.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{model}}/convert.tsv"
    threads: lambda wildcards: min(cores(wildcards), 2 * of_model(wildcards).conversion.processes)
    resources:
        mem_mb=host_memory_mb("convert"),
        runtime=120,
    params:
        key=key("convert"),
        job=job_file,
        changes=changes("convert"),
        processes=lambda wildcards, output: of_model(wildcards).conversion.processes,
        launch=untracked(conversion_launch),
        mtp_num_layers=lambda wildcards, output: of_model(
            wildcards
        ).conversion.mtp_num_layers,
        folder=subpath(output[0], strip_suffix="convert.json"),
    message:
        "{wildcards.model}: convert to Megatron torch_dist{params.changes}"
    shell:
        'begin {log:q}; CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=$(share {threads} {params.processes}) {params.launch} "$SCRIPTS"/convert.py --job {params.job:q} --hub {input.hub:q}'
        " --mtp-num-layers {params.mtp_num_layers} --folder {params.folder:q}torch_dist --manifest {output:q} |& logged"


rule export:
    input:
        hub=f"{RESULTS}/{{model}}/download.json",
        weights=training_of,
    output:
        f"{RESULTS}/{{model}}/hf/{{weights}}.json",
    log:
        f"{RESULTS}/logs/{{model}}/export-{{weights}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{model}}/export-{{weights}}.tsv"
    threads: 2
    resources:
        mem_mb=host_memory_mb("export"),
        runtime=120,
    params:
        key=key("export"),
        job=job_file,
        changes=changes("export"),
        checkpoint=lambda wildcards, output: checkpoint_of(wildcards.weights),
        folder=subpath(output[0], strip_suffix=".json"),
    message:
        "{wildcards.model}: export the {wildcards.weights} weights in the Hub's format{params.changes}"
    shell:
        'begin {log:q}; CUDA_VISIBLE_DEVICES= python "$SCRIPTS"/export.py --job {params.job:q} --hub {input.hub:q} --weights {input.weights:q}'
        " --checkpoint {params.checkpoint} --folder {params.folder:q} --manifest {output:q} |& logged"
