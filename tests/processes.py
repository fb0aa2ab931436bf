"""Processes of their own that need not import PyTorch again: they are forked from one that has."""

import multiprocessing

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["nsq_repro.cli", "nsq_repro.suite", "nsq_repro.plots", "nsq_repro.photographs", "torchvision", "sklearn.datasets"]
    + ["torch._dynamo", "papermill", "pytest", "hypothesis"]  # what optimizers load, and what tests do
)
