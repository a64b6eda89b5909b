"""The profile table: JSON there and back, and what is refused on the way."""

import json
from dataclasses import replace

import pytest

from megatron_hbp.errors import ConfigError, DiskError
from megatron_hbp.planning.cost import profile_table
from megatron_hbp.planning.cost.profile_table import Setting
from tests.unit.planning.profiles import HEADER, row_of, table_of


def test_there_and_back(tmp_path):
    table = table_of([row_of(Setting(tokens=1024, cp_degree=2, recompute="sel=core_attn+mlp", shape="many"))])
    table = table.with_row(replace(row_of(Setting(tokens=2048, cp_degree=1, recompute="none")), fits=False, why="big"))
    profile_table.save(table, tmp_path / "p.json")
    assert profile_table.load(tmp_path / "p.json") == table


def test_a_row_again_replaces_the_old_one():
    setting = Setting(tokens=1024, cp_degree=1, recompute="none")
    table = table_of([row_of(setting)]).with_row(replace(row_of(setting), seconds=9.0))
    assert [row.seconds for row in table.rows] == [9.0]


def test_samples_of_a_shape_fill_the_pack_and_are_always_the_same():
    for shape, count in profile_table.SHAPES.items():
        setting = Setting(tokens=4096, cp_degree=4, recompute="none", shape=shape)
        assert len(setting.sample_lengths()) == count
        assert setting.sample_lengths().sum() == 4096 and setting.sample_lengths().min() > 1
        assert setting.squares == (setting.sample_lengths() ** 2).sum()
    assert Setting(tokens=8, cp_degree=1, recompute="none", shape="many").sample_lengths().sum() == 8


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda v: "{", "is damaged"),
        (lambda v: [], "is not a profile table"),
        (lambda v: v | {"kind": "hbp cost model"}, "is not a profile table"),
        (lambda v: v | {"version": 7}, "has version 7, this program reads 2"),
        (lambda v: {k: x for k, x in v.items() if k != "rows"}, "is damaged"),
        (lambda v: v | {"rows": [{"tokens": 3}]}, "is damaged"),
        (lambda v: v | {"rows": [v["rows"][0] | {"seconds": None}]}, "contradicts itself"),
        (lambda v: v | {"rows": [v["rows"][0] | {"recompute": "half"}]}, "is damaged"),
        (lambda v: v | {"header": {}}, "is damaged"),
        (lambda v: v | {"memory_limit": -1}, "memory_limit is -1"),
        (lambda v: v | {"yardstick": "x"}, "yardstick is 'x'"),
        (lambda v: v | {"header": v["header"] | {"layout": {}}}, "is damaged"),
        (lambda v: v | {"header": v["header"] | {"exchange": "bogus"}}, "exchange is 'bogus'"),
        (lambda v: v | {"rows": [v["rows"][0] | {"peak_bytes": float("nan")}]}, "peak_bytes is nan"),
        (lambda v: v | {"rows": [v["rows"][0] | {"cp_degree": "1"}]}, "cp_degree is '1'"),
        (lambda v: v | {"rows": [v["rows"][0] | {"fits": "false"}]}, "contradicts itself"),
        (lambda v: v | {"rows": [v["rows"][0] | {"recompute": "full99"}]}, "contradicts itself"),
        (lambda v: "[" * 200_000, "is damaged"),
    ],
    ids=[
        "no JSON",
        "list",
        "kind",
        "version",
        "no rows",
        "short row",
        "no seconds",
        "recompute",
        "header",
        "limit",
        "yardstick",
        "layout",
        "exchange",
        "bytes",
        "degree",
        "fits",
        "layers",
        "nested",
    ],
)
def test_what_cannot_be_read_says_why(tmp_path, change, says):
    path = tmp_path / "p.json"
    profile_table.save(table_of([row_of(Setting(tokens=1024, cp_degree=1, recompute="none"))]), path)
    changed = change(json.loads(path.read_text()))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(ConfigError, match=says) as error:
        profile_table.load(path)
    assert str(path) in str(error.value)


def test_a_missing_file_and_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        profile_table.load(tmp_path / "none.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="could not be written"):
        profile_table.save(table_of([]), tmp_path / "file" / "p.json")


def test_another_header_is_refused_by_the_fields_that_differ(tmp_path):
    profile_table.check_header(HEADER, HEADER, tmp_path)
    other = replace(HEADER, device="TPU", supervised=0.5)
    with pytest.raises(ConfigError, match=r"device: TPU there, CPU here; supervised: 0.5 there"):
        profile_table.check_header(other, HEADER, tmp_path)
