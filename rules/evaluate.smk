# Scores of the starting weights ("base") and of the trained ones, under the same protocol.


rule evaluate:
    input:
        model=evaluated_model,
        data=f"{RESULTS}/data/{{dataset}}.json",
    output:
        f"{RESULTS}/{{model}}/eval/{{dataset}}/{{weights}}.json",
    log:
        f"{RESULTS}/logs/{{model}}/evaluate-{{dataset}}-{{weights}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{model}}/evaluate-{{dataset}}-{{weights}}.tsv"
    threads: cores
    resources:
        gpu=gpus("evaluate"),
        gpu_host_gib=gpu_host_gib("evaluate"),
        mem_mb=host_memory_mb("evaluate"),
        runtime=24 * 60,
    params:
        key=key("evaluate"),
        gpus=untracked(gpus("evaluate")),
        job=job_file,
        changes=changes("evaluate"),
        samples=subpath(output[0], strip_suffix=".json"),
    message:
        "{wildcards.model}: evaluate the {wildcards.weights} weights on {wildcards.dataset}{params.changes}"
    shell:
        'begin {log:q}; python -P -m milepost.launch.with_gpus {params.gpus} python "$SCRIPTS"/evaluate_model.py --job {params.job:q} --model {input.model:q} --data {input.data:q}'
        " --samples {params.samples:q}.jsonl --manifest {output:q} |& logged"
