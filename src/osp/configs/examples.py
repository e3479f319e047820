"""Examples of commands, which `osp VERB --help` shows at its end; names in capitals are to be replaced."""

from collections.abc import Mapping, Sequence

EXAMPLES: Mapping[str, Sequence[tuple[str, Sequence[str]]]] = {
    "shards": (
        ("a folder of videos, with captions beside them", ["input=VIDEOS", "output=data/shards"]),
        (
            "4096 procedural clips with captions",
            ["output=data/t2v", "synthetic=plain", "synthetic.clips=4096", "synthetic.frames=9"],
        ),
    ),
    "cache": (
        (
            "latents of all clips, of 9 frames",
            ["input=data/t2v", "output=data/features", "checkpoint=outputs/vae/checkpoints/best.ckpt", "clip.frames=9"],
        ),
        (
            "the same on all GPUs, in half precision",
            ["input=SHARDS", "output=FEATURES", "checkpoint=CHECKPOINT", "processes=8", "precision=auto"],
        ),
    ),
    "train": (
        ("a small VAE, on procedural clips", ["experiment=wfvae_tiny", "output=outputs/vae"]),
        (
            "a small VAE, on videos of your own",
            ["experiment=wfvae_tiny", "data=shards", "data.train.path=data/shards", "output=outputs/own"],
        ),
        (
            "a small text-to-video model, on features",
            ["experiment=t2v_tiny", "data.train.path=data/features", "data.val.path=data/features_heldout"],
        ),
        (
            "two VAEs to compare",
            ["--multirun", "experiment=wfvae_tiny", "vae.latent_channels=4,8", "output=outputs/sweep"],
        ),
    ),
    "plan": (("a stage of v1.3 on eight GPUs", ["experiment=v13_stage1", "trainer=fsdp", "devices=8", "device=h100"]),),
    "chain": (
        ("what would be run", ["chain=tiny", "checkpoint=outputs/vae/checkpoints/best.ckpt", "dry_run=true"]),
        ("all stages, on two devices", ["chain=tiny", "checkpoint=CHECKPOINT", "overrides=['trainer.devices=2']"]),
    ),
    "eval": (
        (
            "what a VAE keeps of videos",
            ["checkpoint=outputs/vae/checkpoints/best.ckpt", "input=VIDEOS", "clip.frames=9", "output=outputs/eval"],
        ),
        (
            "whether a denoiser follows prompts",
            ["target=generation", "checkpoint=outputs/t2v/checkpoints/best.ckpt", "input=data/heldout"],
        ),
    ),
    "sample": (
        (
            "one video",
            [
                "checkpoint=outputs/t2v/checkpoints/best.ckpt",
                "prompt=a red circle slides left",
                "output=outputs/samples",
            ],
        ),
        (
            "four videos of each prompt in a file",
            ["checkpoint=CHECKPOINT", "prompts=PROMPTS.txt", "videos_per_prompt=4"],
        ),
        (
            "published weights, with little memory",
            [
                *("generator=opensora_v13", "denoiser.path=DENOISER", "vae.path=VAE", "text.path=MT5"),
                *("prompts=PROMPTS.txt", "memory=low"),
            ],
        ),
    ),
    "page": (
        (
            "a model and its samples",
            [
                *("vae_run=outputs/vae", "denoiser_run=outputs/t2v", "generation=outputs/t2v_eval"),
                *("samples=outputs/samples", "output=outputs/page.html"),
            ],
        ),
    ),
    "bench": (
        ("a VAE, whole and in pieces", ["target=vae", "frames=[17,33]", "sizes=[128x128,256x256]"]),
        ("a denoiser's attention", ["target=denoiser", "denoiser=cross_tiny", "latents=8x64x64"]),
    ),
    "doctor": (
        ("all of this machine", ["output=doctor.json"]),
        ("the kernels of one GPU", ["device=cuda:0", "only=[attention,norms,rotary,convolution,matmul]"]),
    ),
    "import-weights": (
        ("a published VAE", ["kind=wfvae_v13", "source=DOWNLOADED", "output=weights/wfvae_v13"]),
        (
            "a published denoiser, in half precision",
            ["kind=opensora_v13", "source=DOWNLOADED", "output=weights/opensora_v13", "dtype=bfloat16"],
        ),
    ),
    "inflate": (
        ("OD-VAE from an image VAE", ["source=IMAGE_VAE", "output=weights/inflated"]),
        (
            "CausalVideoVAE of v1.1, each kernel in the middle frame",
            ["source=IMAGE_VAE", "output=weights/inflated", "vae=causalvae_v11", "kernels=centre"],
        ),
    ),
    "export": (
        ("a trained denoiser", ["checkpoint=outputs/run/checkpoints/last.ckpt", "output=weights/mine"]),
        (
            "a trained VAE for the published code",
            ["checkpoint=outputs/tuned/checkpoints/best.ckpt", "output=weights/theirs", "form=published"],
        ),
    ),
    "export-weights": (
        ("a trained VAE", ["source=outputs/tuned/checkpoints/best.ckpt", "output=weights/for_published_code"]),
    ),
}
"""The examples of each verb: what an example does, and its arguments."""
