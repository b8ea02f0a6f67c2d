from tiny import finished, tiny_checkpoint, tiny_root

__all__ = ["finished", "tiny_checkpoint", "tiny_root"]
