"""Knowledge distillation, measured: the small library behind the vanilla-KD study."""

__version__ = "0.1.0"
