"""Fashion-MNIST (Xiao et al. 2017): pictures of clothes in the form of MNIST, made binary at one half."""

from datasets.images import GreyImages
from datasets.mnist import idx_files
from datasets.store import stored_images

URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
MD5 = {"train": "8d4fb7e6c68d591d4c3dfef9ec88bf0d", "t10k": "bef4ecab320f06d8554ea6380940ec79"}


class FashionMNIST(GreyImages):
    """50,000 training and 10,000 validation images, which are the last of the published 60,000, and 10,000 for test."""

    def __init__(self, binarization: str = "threshold", seed: int = 0, url: str = URL, data_root: str = "data"):
        """Take the `binarization`, threshold or draw, the seed of what is drawn once, and where the data are."""
        super().__init__(stored_images("fashion_mnist", idx_files(MD5), url, data_root), binarization, seed)
