"""Functions of processes that make videos together; in a module that the processes can import by its name."""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from osp.conditioning import WordText
from osp.denoiser import CrossTransformer, JointTransformer, Stage
from osp.diffusion import Flow, Solver
from osp.errors import UsageError
from osp.sampling import VideoGenerator
from osp.sampling.progress import Progress
from osp.vae import WFVAE, LatentCodec, Tiling

STAGES = [Stage(1), Stage(2, "skiparse", 2), Stage(1)]
SIZE = (9, 32, 48)


def generator(kind: str) -> VideoGenerator:
    """A tiny generator of random weights, the same in each process."""
    torch.manual_seed(0)
    common: dict[str, Any] = {"channels": 4, "out_channels": 4, "heads": 2, "text_channels": 16, "stages": STAGES}
    if kind == "joint":
        model: Any = JointTransformer(head_dim=16, pooled_channels=16, modulation_width=16, **common)
    else:
        model = CrossTransformer(head_dim=12, **common)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    flows = {"encoder_flow_channels": 4, "decoder_flow_channels": 4, "encoder_blocks": 1, "decoder_blocks": 1}
    codec = LatentCodec(WFVAE(latent_channels=4, base_channels=4, level1="2d", **flows), 0.1, 0.9)
    text = WordText(channels=16, pooled_channels=16, layers=1, heads=2, max_tokens=8).eval()
    return VideoGenerator(model.eval(), text, Flow(), codec)


def made(
    device: torch.device, kind: str, guidance: float, is_shared: bool, tiling: Tiling | None = None, low: bool = False
) -> tuple[Tensor, dict[str, int], int]:
    """Two videos, the bytes sent by use, and how many frames of tiles this process has decoded."""
    one = generator(kind).to(device)
    one.codec.vae.tiling = tiling
    if is_shared:
        one.share(guidance)
    solver, decoded = Solver(Flow(), "euler_ancestral", 3), [0]

    def watch(progress: Progress) -> None:
        decoded.append(progress.done if progress.step == "decode" else 0)

    prompts = ["a red circle", "two blue squares turn"]
    asked: dict[str, Any] = {"solver": solver, "guidance": guidance, "low_memory": low, "progress": watch}
    video = one.generate(prompts, *SIZE, seeds=[5, 6], **asked)
    assert one.writes == (not is_shared or dist.get_rank() == 0)
    sent = [over.sent for over in (one._every, one._branches) if over is not None]
    return video, dict(sum(sent, Counter())), max(decoded)


def refuses(device: torch.device, rank_that_fails: int) -> str:
    """An error that the user can mend, in one process; the others wait for it."""
    if dist.get_rank() == rank_that_fails:
        raise UsageError(f"rank {rank_that_fails} refuses")
    dist.barrier()
    return "done"
