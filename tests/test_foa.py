"""FOA and its search: golden searches, the package `cma` where it is installed, a minimum that is known."""

from pathlib import Path

import numpy as np
import pytest
import torch

import tta
from tta.methods._evolution import CMAES

COMMUNITY = Path(__file__).parent / "golden" / "community"


def ellipsoid(x):
    return (x.square() * torch.logspace(0, 2, x.shape[1], dtype=x.dtype)).sum(1)


def test_candidates_and_elected_prompts_are_those_of_the_released_code(vit, golden_source, golden_images):
    aux = np.load(COMMUNITY / "aux.npz")
    start = torch.from_numpy(aux["foa_prompts_init"]).view(1, 3, 64)
    adapter = tta.adapt(vit, "foa", source=golden_source, initial_prompts=start)
    torch.testing.assert_close(adapter.source_std, torch.from_numpy(aux["foa_source_std"]).flatten())
    torch.testing.assert_close(adapter.source_mean, torch.from_numpy(aux["foa_source_mean"]).flatten())
    draws, asked = np.random.RandomState(2020), []
    ask = adapter.search.ask
    adapter._normals = lambda: torch.from_numpy(draws.randn(27, 192))
    adapter.search.ask = lambda normals: asked.append(ask(normals)) or asked[-1]
    for number, batch in enumerate(golden_images[:256].split(64)):
        adapter(batch)
        candidates = torch.from_numpy(aux["foa_candidates"][number]).view(27, 192).double()
        assert (asked[-1] - candidates).abs().max() < 1e-5
        elected = torch.from_numpy(aux["foa_best_prompts"][number]).flatten()
        assert (adapter.prompts.flatten() - elected).abs().max() < 1e-5


@pytest.mark.parametrize(("dimension", "population"), [(70, 10), (192, 27)])
def test_search_goes_as_that_of_cma(dimension, population):
    """The same draws and fitness give the same samples for a while, an injected solution included.

    The eigenvalues are nearly equal at first, so that rounding turns the axes: by 2e-7 after twelve rounds.
    """
    cma = pytest.importorskip("cma")
    draws = np.random.RandomState(1)
    options = {"popsize": population, "verbose": -9, "seed": np.nan, "randn": draws.randn}
    theirs = cma.CMAEvolutionStrategy(np.zeros(dimension), 1.0, options)
    ours, generator = CMAES(dimension, population), np.random.RandomState(1)
    far = torch.full((1, dimension), 3.0, dtype=torch.float64)
    for _ in range(12):
        expected = torch.from_numpy(np.stack(theirs.ask()))
        samples = ours.ask(torch.from_numpy(generator.randn(population, dimension)))
        torch.testing.assert_close(samples, expected, atol=1e-5, rtol=0)
        solutions = torch.cat([samples, far])
        fitness = ellipsoid(solutions - 1)
        theirs.tell([*expected.numpy(), far[0].numpy().copy()], fitness.tolist())
        ours.tell(solutions, fitness, injected=1)
        far = 0.5 * far


def test_search_finds_the_minimum():
    search, generator = CMAES(8, 10, sigma=0.5), torch.Generator().manual_seed(0)
    for _ in range(250):
        samples = search.ask(torch.randn(10, 8, generator=generator, dtype=torch.float64))
        search.tell(samples, ellipsoid(samples - 1))
    torch.testing.assert_close(search.mean, torch.ones(8, dtype=torch.float64), atol=1e-4, rtol=0)


def test_a_search_stays_on_the_cpu_in_double_precision():
    search = CMAES(4, 6).half().to("meta")
    assert {value.dtype for value in search.buffers()} == {torch.float64, torch.int64}
    assert {value.device.type for value in search.buffers()} == {"cpu"}


def test_a_single_image_is_not_learned_from(vit, golden_source, golden_images):
    adapter = tta.adapt(vit, "foa", source=golden_source, population=4)
    adapter(golden_images[:8])
    before = adapter.state_dict()
    assert adapter(golden_images[8:9]).isfinite().all()
    assert all(torch.equal(value, before[key]) for key, value in adapter.state_dict().items())


def test_shift_alone_equals_its_formula(vit, golden_source, golden_images):
    """FOA-Shift: the first batch as the source model, the second with the features moved by source minus first mean."""
    adapter = tta.adapt(vit, "foa", source=golden_source, num_prompts=0, gain=0.5)
    first, second = golden_images[:64], golden_images[64:128]
    with torch.no_grad():
        assert torch.equal(adapter(first), vit.eval()(first))
        features = [vit.forward_head(vit.forward_features(x), pre_logits=True) for x in (golden_source, first, second)]
        shift = 0.5 * (features[0].mean(0) - features[1].mean(0))
        torch.testing.assert_close(adapter(second), vit.head(features[2] + shift), atol=1e-4, rtol=1e-4)


def test_other_models_are_refused(cnn, golden_source):
    with pytest.raises(ValueError, match="VisionTransformer"):
        tta.adapt(cnn, "foa", source=golden_source)
