"The environment of every test, set before anything imports torch: offline, two threads, and workers that do not spin while they wait."
import os

os.environ.update(OMP_WAIT_POLICY="PASSIVE", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="2")
