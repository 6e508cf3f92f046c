# Tables, plots and one self-contained page about the models that config.yaml lists or compares.


rule tables:
    """Write the tables."""
    input:
        scores=shown_scores,
        trainings=trainings(settings.trainings),
    output:
        csv=f"{RESULTS}/tables/scores.csv",
        differences=f"{RESULTS}/tables/differences.csv",
        markdown=f"{RESULTS}/tables/scores.md",
    log:
        f"{RESULTS}/logs/tables.log",
    benchmark:
        f"{RESULTS}/benchmarks/tables.tsv"
    threads: 1
    resources:
        mem_mb=4096,
        runtime=30,
    params:
        key=key("tables"),
        job=job_file,
    message:
        "write the tables"
    shell:
        'begin {log:q}; python "$SCRIPTS"/make_tables.py --job {params.job:q} --scores {input.scores:q} --trainings {input.trainings:q}'
        " --csv {output.csv:q} --differences {output.differences:q} --markdown {output.markdown:q} |& logged"


rule comparison:
    """Write the tables of the target `compare`."""
    input:
        scores=compared_scores,
        trainings=trainings(settings.trainings_of(settings.compared)),
    output:
        csv=f"{RESULTS}/tables/comparison-scores.csv",
        differences=f"{RESULTS}/tables/comparison.csv",
        markdown=f"{RESULTS}/tables/comparison.md",
    log:
        f"{RESULTS}/logs/comparison.log",
    benchmark:
        f"{RESULTS}/benchmarks/comparison.tsv"
    threads: 1
    resources:
        mem_mb=4096,
        runtime=30,
    params:
        key=key("comparison"),
        job=job_file,
    message:
        "compare the scores"
    shell:
        'begin {log:q}; python "$SCRIPTS"/make_tables.py --job {params.job:q} --scores {input.scores:q} --trainings {input.trainings:q}'
        " --csv {output.csv:q} --differences {output.differences:q} --markdown {output.markdown:q} |& logged"


rule plots:
    """Draw the plots."""
    input:
        scores=shown_scores,
        trainings=trainings(settings.trainings),
    output:
        f"{RESULTS}/plots.json",
    log:
        f"{RESULTS}/logs/plots.log",
    benchmark:
        f"{RESULTS}/benchmarks/plots.tsv"
    threads: 1
    resources:
        mem_mb=4096,
        runtime=30,
    params:
        key=key("plots"),
        job=job_file,
        changes=changes("plots"),
        folder=subpath(output[0], strip_suffix=".json"),
    message:
        "draw the plots{params.changes}"
    shell:
        'begin {log:q}; python "$SCRIPTS"/make_plots.py --job {params.job:q} --scores {input.scores:q}'
        " --trainings {input.trainings:q} --folder {params.folder:q} --manifest {output:q} |& logged"


rule page:
    """Write the page of the target `report`."""
    input:
        scores=shown_scores,
        trainings=trainings(settings.trainings),
        sources=shown_sources(),
        plots=f"{RESULTS}/plots.json",
        tables=f"{RESULTS}/tables/scores.csv",
    output:
        f"{RESULTS}/report.html",
    log:
        f"{RESULTS}/logs/report.log",
    benchmark:
        f"{RESULTS}/benchmarks/report.tsv"
    threads: 1
    resources:
        mem_mb=4096,
        runtime=30,
    params:
        key=key("report"),
        job=job_file,
    message:
        "write the report"
    shell:
        'begin {log:q}; python "$SCRIPTS"/make_report.py --job {params.job:q} --scores {input.scores:q}'
        " --trainings {input.trainings:q} --plots {input.plots:q} --sources {input.sources:q} --html {output:q} |& logged"
