"""benchmarks/performance.py writes its tables between the markers of its page, and nothing else of the page."""

import importlib
from pathlib import Path

import pytest
import timm
import torch

import tta

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def performance():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return importlib.import_module("performance")


def test_only_what_stands_between_the_markers_is_written(performance):
    page = performance.PAGE.read_text(encoding="utf-8")
    for name in performance.TABLES:
        first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
        found = performance.written(page, name, "NEW")
        assert found == f"{page.split(first)[0]}{first}\n\nNEW\n\n{last}{page.split(last)[1]}"


def test_a_page_without_markers_is_refused(performance):
    with pytest.raises(ValueError, match="<!-- steps --> and <!-- end of steps -->"):
        performance.written("<!-- end of steps --> <!-- steps -->", "steps", "NEW")


def test_a_row_is_in_frozen_forwards(performance):
    seconds = {"frozen": 2.0, "floor": 2.0, "eager": 5.0, "compiled": 3.0, "beside": 10.0}
    *_, row = performance.table({"tent": (seconds, 7_000_000)}).splitlines()
    assert row == "| `tent` | 2.50 | 1.50 | 5.00 | 0.50 | 0.30 | 1.00 | 2.50 | 7 |"


def test_a_method_whose_passes_are_not_known_has_no_floor(performance):
    *_, row = performance.table({"lame": ({"frozen": 2.0, "eager": 3.0}, 4_000_000)}).splitlines()
    assert row == "| `lame` | 1.50 |  |  |  |  |  |  | 4 |"


def test_the_exponent_is_that_of_a_power(performance):
    assert performance.exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2.0)


def test_rows_of_other_methods_stay(performance):
    seconds = {"frozen": 2.0, "floor": 2.0, "eager": 5.0}
    before = performance.steps("first", "ON THIS.", performance.table({"sar": (seconds, 1), "norm": (seconds, 1)}))
    faster = {**seconds, "eager": 4.0}
    after = performance.merged(
        before, "second", "ON THIS.", performance.table({"sar": (faster, 1), "tent": (seconds, 1)})
    )
    everything = {"norm": (seconds, 1), "sar": (faster, 1), "tent": (seconds, 1)}
    assert after == performance.steps("first\nsecond", "ON THIS.", performance.table(everything))
    again = performance.merged(after, "second", "ON THIS.", performance.table({"tent": (seconds, 1)}))
    assert again == after


def test_rows_that_were_measured_otherwise_are_not_mixed(performance, monkeypatch, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text := performance.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    words = ["performance.py", "--tables", "steps", "--methods", "norm", "--batch-size", "3", "--page", str(page)]
    monkeypatch.setattr(performance.sys, "argv", words)
    with pytest.raises(SystemExit, match=r"batch 3, .* measure every method"):
        performance.main()
    assert page.read_text(encoding="utf-8") == text


def test_passes_of_a_filter_are_counted(performance):
    x = torch.rand(8, 3, 32, 32)
    model = performance.resnet20(x)
    assert performance.passes(tta.adapt(model, "tent"), "tent", x) == 2
    assert 2 < performance.passes(tta.adapt(model, "roid"), "roid", x) < 4  # a view of some images, not of all


NETWORKS = {"resnet18": {}, "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8}}


@pytest.mark.parametrize("name", NETWORKS)
def test_checkpoints_in_a_network_of_timm_take_less_memory_and_change_no_logit(performance, name):
    if not hasattr(timm.layers, "use_reentrant_ckpt"):
        pytest.skip("this timm checkpoints reentrantly: blocks whose input has no gradient learn nothing")
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=10, **NETWORKS[name]).eval()
    batches = torch.rand(3, 16, 3, 32, 32)
    plain = tta.adapt(model, "tent")
    model.set_grad_checkpointing()
    checkpointed = tta.adapt(model, "tent")
    for x in batches[:2]:
        torch.testing.assert_close(checkpointed(x), plain(x))
    assert not torch.equal(plain(x), plain(x))  # it learns
    peaks = [
        performance.peak_bytes(lambda adapter=adapter: adapter(batches[2]), performance.CPU)
        for adapter in (plain, checkpointed)
    ]
    assert peaks[1] < 0.9 * peaks[0]
