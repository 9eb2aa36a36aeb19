"""Results as long tables: names where they belong, every number once, nothing undefined."""

import csv
import sys
from dataclasses import fields
from importlib import import_module

import numpy as np
import pytest

from vitprobe import VitprobeError
from vitprobe.attention_distance import AttentionDistanceResult
from vitprobe.catalogue import measurements
from vitprobe.cka import CKAResult
from vitprobe.localization import LocalizationResult
from vitprobe.position_embedding import PositionEmbeddingResult
from vitprobe.results.tables import long_table
from vitprobe.skip_ablation import SkipAblationResult

META = {"models": [{"name": "vit, small"}, {"name": "cnn"}]}


@pytest.fixture
def cka():
    values = np.array([[1, 0.5, 0.25], [0.5, 1, np.nan], [0.25, np.nan, 1]])
    return CKAResult(META, values, values / 100, np.array(["a", "b", "a"]), np.array([0, 0, 1]))


def test_cka_names_both_layers_and_leaves_out_what_is_undefined(cka, tmp_path):
    path = cka.to_csv(tmp_path / "deep" / "cka.csv")
    assert path.read_text().splitlines() == [
        "quantity,layer,model,layer_2,model_2,value,standard_error",
        'cka,a,"vit, small",a,"vit, small",1.0,0.01',
        'cka,a,"vit, small",b,"vit, small",0.5,0.005',
        'cka,a,"vit, small",a,cnn,0.25,0.0025',
        'cka,b,"vit, small",a,"vit, small",0.5,0.005',
        'cka,b,"vit, small",b,"vit, small",1.0,0.01',
        'cka,a,cnn,a,"vit, small",0.25,0.0025',
        "cka,a,cnn,a,cnn,1.0,0.01",
    ]


def test_quantities_of_fewer_axes_leave_the_others_empty(tmp_path):
    result = AttentionDistanceResult(
        META, np.array([[1.5, 2.5], [3.5, np.nan]]), np.full((2, 2), 0.125),
        np.array([4.0, 5.0]), np.array(["x", "y"]), np.array([0, 1]),
    )  # fmt: skip
    with result.to_csv(tmp_path / "t.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    told = [(r["quantity"], r["layer"], r["head"], r["value"], r["standard_error"]) for r in rows]
    assert told == [
        ("distance_px", "x", "0", "1.5", "0.125"),
        ("distance_px", "x", "1", "2.5", "0.125"),
        ("distance_px", "y", "0", "3.5", "0.125"),
        ("uniform_px", "x", "", "4.0", ""),
        ("uniform_px", "y", "", "5.0", ""),
    ]


def test_names_over_two_axes_go_with_the_panel(tmp_path):
    result = SkipAblationResult(
        META,
        cka=np.arange(8.0).reshape(2, 2, 2),
        layers=np.array([["a", "b"], ["c", "d"]]),
        model_of_panel=np.array([0, 1]),
        block=np.array(["", "c"]),
        side=np.array([[1, 1], [0, 2]]),
        means=np.zeros((2, 4)), means_se=np.zeros((2, 4)), loss=np.zeros((2, 2)),
    )  # fmt: skip
    table = long_table(result, ["cka"])
    told = list(zip(*(table[c].tolist() for c in ("model", "block", "layer", "layer_2", "value"))))
    assert told[1] == ("vit, small", "", "a", "b", 1.0)
    assert told[6] == ("cnn", "c", "d", "c", 6.0)


def test_tokens_say_their_layer_and_number_within_it():
    result = LocalizationResult(
        META,
        cka=np.arange(20, dtype=np.float32).reshape(5, 2, 2),
        tokens=np.array([[0, 0], [0, 1], [1, 0], [1, 1], [0, 0]]),
        layer_of_token=np.array([0, 0, 0, 0, 1]),
        layers=np.array(["block", "map"]), model_of_layer=np.array([0, 1]),
        depth=np.ones(2), grids=np.array([[2, 2], [1, 1]]), contrast=np.ones(2),
        contrast_se=np.ones(2), peak_share=np.ones(2), peak_share_se=np.ones(2),
    )  # fmt: skip
    table = long_table(result, ["cka"])
    at = table["value"].tolist().index(13.0)  # of token 3, at patch (0, 1)
    told = {name: column[at].item() for name, column in table.items()}
    assert (told["model"], told["layer"], told["token"]) == ("vit, small", "block", 3)
    assert (told["token_row"], told["token_column"], told["row"], told["column"]) == (1, 1, 0, 1)
    assert table["layer"][-1] == "map" and table["token"][-1] == 0 and table["model"][-1] == "cnn"


def test_offsets_count_from_the_middle_and_rows_within_their_table():
    result = PositionEmbeddingResult(
        {**META, "tables": [{"label": "one"}, {"label": "two"}]},
        similarity=np.arange(8.0).reshape(4, 1, 2, 1),
        table_of_row=np.array([0, 0, 1, 1]),
        bias=np.arange(3.0).reshape(1, 1, 3, 1),
        layers=np.array(["attn"]), model_of_layer=np.array([1]),
    )  # fmt: skip
    table = long_table(result)
    alike = table["quantity"] == "similarity"
    assert table["table"][alike].tolist() == ["one"] * 4 + ["two"] * 4
    assert table["row"][alike].tolist() == [0, 0, 1, 1] * 2
    assert table["other_row"][alike].tolist() == [0, 1] * 4
    assert table["vertical_offset"][~alike].tolist() == [-1, 0, 1]
    assert set(table["model"][~alike]) == {"cnn"}


@pytest.mark.parametrize("analysis", measurements())
def test_every_array_of_every_result_has_declared_axes(analysis):
    result_type = import_module(f"vitprobe.{analysis}").RESULT
    arrays = {field.name for field in fields(result_type)} - {"meta"}
    # Pictures are no numbers to tabulate; a token's place is told by labels.
    untold = {
        "attention_rollout": {"pictures"},
        "token_norms": {"pictures"},
        "patch_pca": {"pictures"},
        "localization": {"tokens", "grids"},
    }
    assert arrays - set(result_type.axes) == untold.get(analysis, set())
    assert set(result_type.axes) <= arrays


def test_data_frames_pivot_back_to_the_array(cka):
    pytest.importorskip("pandas")
    frame = cka.to_dataframe()
    keys = ["model", "layer"], ["model_2", "layer_2"]
    square = frame.pivot(index=keys[0], columns=keys[1], values="value")
    assert square.loc[("cnn", "a"), ("vit, small", "a")] == 0.25
    assert np.isnan(square.loc[("cnn", "a"), ("vit, small", "b")])


def test_indices_that_some_rows_lack_stay_whole_numbers():
    pandas = pytest.importorskip("pandas")
    result = AttentionDistanceResult(
        META, np.ones((1, 2)), np.ones((1, 2)), np.ones(1), np.array(["x"]), np.array([0])
    )
    heads = result.to_dataframe()["head"]
    assert heads.iloc[1] == 1 and heads.iloc[2] is pandas.NA and str(heads.dtype) == "Int64"


def test_without_pandas_one_line_says_what_to_do(cka, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(VitprobeError, match="pip install pandas"):
        cka.to_dataframe()


def test_an_unknown_quantity_names_the_known_ones(cka, tmp_path):
    with pytest.raises(VitprobeError, match=r"no quantity 'ckaa'\. Did you mean cka"):
        cka.to_csv(tmp_path / "x.csv", ["ckaa"])
    assert not list(tmp_path.iterdir())
