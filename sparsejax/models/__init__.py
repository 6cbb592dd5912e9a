"""Networks for the experiments, in Flax NNX; they know nothing of sparsity."""

from sparsejax.models.mlp import MLP as MLP
from sparsejax.models.mlp import lenet_300_100 as lenet_300_100
from sparsejax.models.resnet import ResNet as ResNet
from sparsejax.models.resnet import resnet_cifar as resnet_cifar
