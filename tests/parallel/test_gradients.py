"""Predictions and the gradient of every weight where processes share the work, against those of one process."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from denoisers import CLIPS, EVEN, LAYOUTS, ODD, SMALL, V13, Case, Layout, make, relative, shared
from processes import Processes
from torch import Tensor, nn

from osp.denoiser import CrossTransformer, JointTransformer, LatteTransformer
from osp.parallel import drawn_weights, local, whole
from osp.parallel.pieces import read_like
from osp.vae import WFVAE
from osp.weights.lazy import Stored

FULL = [
    Case("cross", "every", ODD, ""),
    Case("joint", "every", ODD, ""),
    Case("cross", "every", ODD, "video text", recompute_every=2),
    Case("joint", "every", ODD, "video text", recompute_every=2),
]
SINGLE = [
    Case("cross", "v13", ODD, "video", torch.float32),
    Case("joint", "suv", ODD, "", torch.float32),
]
OTHERS = [  # other grids, and the schedules of the published models
    Case("cross", "every", EVEN, "video"),
    Case("cross", "v13", ODD, "text", recompute_every=1),
    Case("joint", "suv", EVEN, "text"),
    Case("joint", "v13", SMALL, ""),
]
LATTE = [Case("latte", "own", ODD, "video text", recompute_every=1)]
CASES = {
    "ddp": FULL + SINGLE,
    "fsdp": FULL + SINGLE + LATTE,
    "sequence": FULL + SINGLE + OTHERS + LATTE,
    "sequence of four": FULL[1:3] + OTHERS[3:],
    "hybrid": FULL[2:],
    "fsdp, sequence": FULL + LATTE,
    "hybrid, sequence": FULL[2:3] + OTHERS[2:3],
}


def backward(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """The prediction, of which a loss has left its gradients."""
    prediction: Tensor = model(**given)
    (prediction - given["latent"].flip(1)).square().mean().backward()
    return prediction.detach()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], str]:
    """The file with what one process gets in a case, made when it is first asked for."""
    folder, made = tmp_path_factory.mktemp("alone"), dict[Case, str]()

    def file(case: Case) -> str:
        if case not in made:
            model = case.model()
            prediction = backward(model, case.inputs(model))
            gradients = {key: weight.grad for key, weight in model.named_parameters()}
            made[case] = str(folder / f"{len(made)}.pt")
            torch.save((prediction, gradients), made[case])
        return made[case]

    return file


def differences(layout: Layout, cases: list[tuple[Case, str]]) -> list[dict[str, float]]:
    """By case the largest difference of the prediction, and of the gradient of any weight, to those in the files.

    Each is a part of the largest value of the one process; in single precision that is of the gradient of any weight,
    since one that nearly cancels (of the queries of a saturated softmax) is rounding noise in any layout.
    """
    found = []
    for case, file in cases:
        alone, gradients = torch.load(file)
        share = CLIPS * layout.sequence // layout.processes
        start = dist.get_rank() // layout.sequence * share
        model = case.model()
        given = {key: value[start : start + share] for key, value in case.inputs(model).items()}
        model = shared(layout, model, recompute_every=case.recompute_every, offload_activations=bool(case.padded))
        off = {"prediction": relative(backward(model, given), alone[start : start + share])}
        largest = max(float(gradient.abs().max()) for gradient in gradients.values() if gradient is not None)
        for (key, expected), parameter in zip(gradients.items(), model.parameters(), strict=True):
            assert (expected is None) == (parameter.grad is None), key
            if expected is not None:
                ours, theirs = local(parameter.grad), local(read_like(parameter.grad, Stored.of(expected)))
                scale = float(expected.abs().max()) if case.dtype == torch.float64 else largest
                off[key] = float((ours - theirs).abs().max()) / max(scale, 1e-12) if len(ours) else 0.0
        found.append(off)
    return found


@pytest.mark.parametrize("layout", CASES)
def test_predictions_and_gradients_are_those_of_one_process(
    processes: Processes, alone: Callable[[Case], str], layout: str
) -> None:
    files = [(case, alone(case)) for case in CASES[layout]]
    for found in processes.run(LAYOUTS[layout].processes, differences, LAYOUTS[layout], files):
        for (case, _), off in zip(files, found, strict=True):
            assert len(off) > 60
            worst = max(off, key=off.__getitem__)
            assert off[worst] <= (1e-10 if case.dtype == torch.float64 else 1e-5), (case, worst, off[worst])


@pytest.mark.parametrize(
    "make_one",
    [
        lambda: CrossTransformer(stages=V13, heads=2, head_dim=12, text_channels=6, frame_channels=[4, 1]),
        lambda: JointTransformer(
            stages=V13, heads=2, head_dim=16, text_channels=6, pooled_channels=6, modulation_width=8
        ),
        lambda: LatteTransformer(pairs=1, heads=2, head_dim=12, text_channels=6),
        lambda: WFVAE(base_channels=4, encoder_flow_channels=4, decoder_flow_channels=4, encoder_blocks=1),
    ],
)
def test_weights_are_drawn_one_by_one_as_if_at_once(make_one: Any) -> None:
    torch.manual_seed(5)
    at_once, after = make_one().state_dict(), torch.rand(3)
    torch.manual_seed(5)
    one_by_one = drawn_weights(make_one)
    assert torch.equal(torch.rand(3), after)
    assert one_by_one.keys() == at_once.keys()
    for key in reversed(list(at_once)):
        assert torch.equal(one_by_one[key], at_once[key]), key


def steps_of_muon(layout: str) -> list[Tensor]:
    from osp.training.optimisation import Optimisation

    model = nn.ModuleDict({"denoiser": shared(LAYOUTS[layout], make("cross", V13, torch.float32))})
    optimizers = Optimisation(lr=1e-2, weight_decay=0.1).with_muon(model, 1e-2)
    for step in range(3):
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
            parameter.grad = read_like(parameter, Stored.of(drawn))
        for optimizer in optimizers:
            optimizer.step()
    return [whole(parameter.detach()) for parameter in model.parameters()]


def test_muon_moves_matrices_that_are_split_as_whole_ones(processes: Processes) -> None:
    split, kept = (processes.run(2, steps_of_muon, layout)[0] for layout in ("fsdp", "ddp"))
    for ours, theirs in zip(split, kept, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
