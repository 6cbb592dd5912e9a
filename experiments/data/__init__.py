"""Image datasets: one interface, in memory or streamed, in an order that a seed sets.

`load` takes the `data` of a config and returns a `Dataset`: "digits", which
scikit-learn embeds, or any image classification dataset that tfds finds prepared as
ArrayRecord.

    sources.py       where the images come from, and what to do where they are missing
    memory.py        splits that are decoded once
    streaming.py     splits that are decoded as they are needed
    augment.py       crop, flip, random resized crop, central crop
    rand_augment.py  RandAugment
    mixing.py        mixup and cutmix
    order.py         which examples a batch has
    iterator.py      goes through the batches; its position is kept
    dataset.py       all of it together
    prepare.py       a dataset out of a folder of images; what is wrong with one
"""

from experiments.data.dataset import Dataset as Dataset
from experiments.data.dataset import load as load
from experiments.data.iterator import Batch as Batch
from experiments.data.iterator import Batches as Batches
from experiments.data.memory import Split as Split
