"""A problem set as others keep it, in gzipped parquet and CSV with nested keys, is filtered, asked and graded."""

import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq

SETTINGS = """
models: [tiny]
datasets:
  mine:
    folder: data
    file: [sums-*.parquet.gz, worked.csv.gz]
    prompt_key: extra_info.question
    label_key: reward_model.ground_truth
    system: Add.
    filter: {data_source: sums, extra_info.level: [1, 2]}
    rows: 1:5
    unique_prompts: true
evaluation: {datasets: [mine], samples_per_problem: 2, pass_at: [1], max_response_tokens: 8}
per_model: {tiny: {source: {tiny: {hidden: 64, warm_up: {steps: 0}}}}}
"""


def row(left, right, level, source="sums"):
    return {
        "data_source": source,
        "extra_info": {"question": f"What is {left} + {right}?", "level": level},
        "reward_model": {"style": "rule", "ground_truth": str(left + right)},
    }


def write_parquet(path, rows):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    path.write_bytes(gzip.compress(file.getvalue(), mtime=0))


def test_it_is_asked_and_graded_and_what_changes_it_reruns_it(snakemake, root, tmp_path):
    def run(*arguments):
        flags = ("--cores", "2", "--directory", str(tmp_path), "--configfile", str(tmp_path / "mine.yaml"))
        done = snakemake(*flags, *arguments, "--", scores, snakefile=root / "Snakefile", cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    scores, data = "results/tiny/eval/mine/base.json", tmp_path / "data"
    data.mkdir()
    write_parquet(data / "sums-0.parquet.gz", [row(10, 11, 1), row(12, 13, 3), row(14, 15, 2)])
    write_parquet(data / "sums-1.parquet.gz", [row(16, 17, 1, "poems"), row(18, 19, 2)])
    header = "data_source,extra_info.question,extra_info.level,reward_model.ground_truth\n"
    content = header + 'sums,"What is\n20 + 21?",1,041\nsums,What is 22 + 23?,2,45\nsums,What is 24 + 25?,2,49\n'
    (data / "worked.csv.gz").write_bytes(gzip.compress(content.encode()))
    (tmp_path / "mine.yaml").write_text(SETTINGS)
    run()
    problems = json.loads((tmp_path / scores).read_text())["facts"]["per_problem"]
    assert [problem["label"] for problem in problems] == ["29", "37", "041", "45"]
    assert len((tmp_path / scores).with_suffix(".jsonl").read_text().splitlines()) == 4 * 2

    write_parquet(data / "sums-1.parquet.gz", [row(18, 19, 2)])
    said = run("-n", "--config", "datasets={mine: {rows: 0:2, filter: {extra_info.level: 2}}}")
    assert "mine: fetch the problem set (content.sums-1.parquet.gz: " in said
    assert "dataset.filter.extra_info.level: [1, 2] -> 2" in said and 'dataset.rows: "1:5" -> "0:2"' in said
