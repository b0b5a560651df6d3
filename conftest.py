"""The tests compare with numbers of a CPU, so they and what they start see no GPU."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
