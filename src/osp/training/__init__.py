"""LightningModules, losses and discriminator, averaged weights, checkpoints, callbacks."""
