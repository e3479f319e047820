"""OSP: the Open-Sora Plan recipe as one clean, fast, tested codebase."""

import os

# Threads that spin while they wait slow each other many times over as soon as something else, be it our own loader
# workers, runs on the same cores. Has to be set before torch is loaded; a value of the user's own is kept.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Backends beside CUDA are imported when such a device is chosen. Torch would import all that are installed with itself,
# and fail where one lacks its driver.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

from osp._torchvision import prepare_import

__version__ = "0.1.0"

prepare_import()  # for lightning, torchmetrics and lpips, which import torchvision
