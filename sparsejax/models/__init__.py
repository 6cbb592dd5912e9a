"""Networks for the experiments, in Flax NNX; they know nothing of sparsity.

They are made of the layers of NNX and keep no number of channels beside them, so that
they still run when channels are taken from the layers; only the shortcut "padding" of
`ResNet` knows how many it adds. A batch may be of any size, and even symbolic.
"""

from sparsejax.models.mlp import MLP as MLP
from sparsejax.models.mlp import lenet_300_100 as lenet_300_100
from sparsejax.models.mobilenet_v1 import MobileNetV1 as MobileNetV1
from sparsejax.models.mobilenet_v1 import mobilenet_v1 as mobilenet_v1
from sparsejax.models.mobilenet_v2 import MobileNetV2 as MobileNetV2
from sparsejax.models.mobilenet_v2 import mobilenet_v2 as mobilenet_v2
from sparsejax.models.resnet import BasicBlock as BasicBlock
from sparsejax.models.resnet import Bottleneck as Bottleneck
from sparsejax.models.resnet import CifarStem as CifarStem
from sparsejax.models.resnet import ImagenetStem as ImagenetStem
from sparsejax.models.resnet import ResNet as ResNet
from sparsejax.models.resnet import resnet as resnet
from sparsejax.models.resnet import resnet_cifar as resnet_cifar
from sparsejax.models.vgg import VGG as VGG
from sparsejax.models.vgg import vgg as vgg
from sparsejax.models.vgg import vgg_cifar as vgg_cifar
from sparsejax.models.vit import ViT as ViT
from sparsejax.models.vit import vit_b16 as vit_b16
from sparsejax.models.vit import vit_s16 as vit_s16
from sparsejax.models.wide_resnet import WideResNet as WideResNet
from sparsejax.models.wide_resnet import wide_resnet as wide_resnet
