"""What is done to models from outside."""

import torch
from torch.utils._pytree import tree_leaves

from osp.conditioning import WordText
from osp.parallel.apply import open_results
from osp.vae import WFVAE


def test_torch_finds_the_tensors_in_results_of_sharded_models() -> None:
    """FSDP looks for them by torch's own means."""
    vae = WFVAE(latent_channels=4, base_channels=4, encoder_flow_channels=4, decoder_flow_channels=4)
    text = WordText(channels=16, max_tokens=4)
    for model in (vae, text):
        model.register_forward_hook(open_results)
    autoencoding, words = vae(torch.zeros(1, 3, 5, 16, 16)), text(["a red ball"])
    found = {id(leaf) for leaf in tree_leaves((autoencoding, words))}
    posterior = autoencoding.posterior
    wanted = (autoencoding.reconstruction, posterior.mean, posterior.logvar, *autoencoding.decoder_coefficients)
    assert {id(tensor) for tensor in (*wanted, words.text)} <= found
