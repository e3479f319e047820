"""Files <-> tensors: video decoding and encoding, procedural clips, shards, loading."""
