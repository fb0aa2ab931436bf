"""Soft-quantization networks against adversarial examples: Zheng, Chen and Ren's paper (arXiv 1810.05665) as software.

The names below are the ones to start from; each is loaded, with PyTorch, when it is first used:

    import nsq_repro as nsq
    net = nsq.SoftQuantNet(my_model, nsq.SoftQuantize(K=1, alpha=1000.))

Everything else lives in the modules: `nsq_repro.attacks`, `nsq_repro.training`, and so on.
"""

import warnings

__version__ = "0.2.0"

warnings.filterwarnings("ignore", message="IProgress not found")  # bars are text where there are no widgets

# where each public name is defined
_HOME = {
    "soft_quantize": "quantization", "SoftQuantize": "quantization",
    "SoftQuantNet": "networks", "load_checkpoint": "networks",
    "load_model": "weights",
    "load": "data",
    "TrainSpec": "training", "train": "training",
    "fgsm": "attacks", "pgd": "attacks",
    "AttackSpec": "evaluation", "accuracy_vs_eps": "evaluation",
}

__all__ = ["soft_quantize", "SoftQuantize", "SoftQuantNet", "load", "TrainSpec", "train",
           "AttackSpec", "pgd", "fgsm", "accuracy_vs_eps", "load_checkpoint",
           "load_model"]


def __getattr__(name):
    "Import a public name from its module on first use (PEP 562), so that `import nsq_repro` itself loads nothing."
    if name not in _HOME: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__(): return sorted(set(globals()) | set(__all__))
