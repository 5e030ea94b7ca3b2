"""Every test runs offline, on one thread, without telemetry; so do the processes it starts."""

import os

# Before torch or transformers are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["DO_NOT_TRACK"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # exact results need the CPU; set it to use a GPU

import torch

torch.set_num_threads(1)
