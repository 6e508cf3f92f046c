# Starting weights and problem sets: fetched from the Hub, linked from a local folder, or generated.


rule download:
    output:
        f"{RESULTS}/{{model}}/download.json",
    log:
        f"{RESULTS}/logs/{{model}}/download.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{model}}/download.tsv"
    threads: 2
    resources:
        mem_mb=4096,
        runtime=240,
    params:
        key=key("download"),
        job=job_file,
        changes=changes("download"),
        script=lambda wildcards, output: of_model(wildcards).source.script,
        hub=f"{RESULTS}/hub",
    message:
        "{wildcards.model}: fetch the starting weights{params.changes}"
    shell:
        'begin {log:q}; CUDA_VISIBLE_DEVICES= python "$SCRIPTS"/{params.script}.py --job {params.job:q} --name {wildcards.model}'
        " --folder {params.hub:q} --manifest {output:q} |& logged"


rule dataset:
    output:
        f"{RESULTS}/data/{{name}}.json",
    log:
        f"{RESULTS}/logs/data/{{name}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/data/{{name}}.tsv"
    priority: 100
    threads: 1
    resources:
        data_first=ALL_DATA_FIRST,
        mem_mb=4096,
        runtime=60,
    params:
        key=key("dataset"),
        job=job_file,
        changes=changes("dataset"),
        script=lambda wildcards, output: settings.datasets[wildcards.name].script,
        folder=subpath(output[0], parent=True),
    message:
        "{wildcards.name}: fetch the problem set{params.changes}"
    shell:
        'begin {log:q}; python "$SCRIPTS"/{params.script}.py --job {params.job:q} --name {wildcards.name}'
        " --folder {params.folder:q} --manifest {output:q} |& logged"
