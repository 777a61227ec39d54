"""One thread: tests share the machine with each other and with CI, where torch's threads would wait for each other."""

import torch

torch.set_num_threads(1)
