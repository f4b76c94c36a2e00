"""Recommenders, towers, sets, graphs and tables: embeddings with perceptrons, shared modules, constant adjacency."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.architecture import Architecture, floats, mixed, tokens
from tests.zoo.places import Places
from tests.zoo.units import Add, Dense, Perceptron, Unit

USERS = 40


class Siamese(nn.Module):
    """One tower for both images; the difference of the embeddings decides."""

    def __init__(self, places: Places):
        super().__init__()
        self.tower = nn.Sequential(
            places.noise("on input", 3), Unit(places, 3, 16, 3, 2), Unit(places, 16, 24, 3, 2), nn.AdaptiveAvgPool2d(2),
            nn.Flatten(), Dense(places, 96, 32), nn.Linear(32, 24),
        )  # fmt: skip
        self.head = nn.Linear(24, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.sigmoid(self.head(torch.abs(self.tower(left) - self.tower(right))))


class TwoTower(nn.Module):
    """A query and a document tower; cosine similarity of all pairs."""

    def __init__(self, places: Places, width: int = 24):
        super().__init__()
        self.embed = nn.Embedding(USERS, width)
        self.query = nn.Sequential(Dense(places, width, 48), Dense(places, 48, 32), nn.Linear(32, 16))
        self.document = nn.Sequential(Dense(places, 20, 48), Dense(places, 48, 32), nn.Linear(32, 16))

    def forward(self, query: Tensor, document: Tensor) -> Tensor:
        query = F.normalize(self.query(self.embed(query).mean(1)), dim=-1)
        return query @ F.normalize(self.document(document), dim=-1).t()


class DLRM(nn.Module):
    """Dense features and embeddings; all pairs of dot products, below the diagonal."""

    def __init__(self, places: Places, fields: int = 3, width: int = 16):
        super().__init__()
        self.bottom = nn.Sequential(Dense(places, 10, 32), Dense(places, 32, width))
        self.tables = nn.ModuleList(nn.Embedding(USERS, width) for _ in range(fields))
        rows, columns = torch.tril_indices(fields + 1, fields + 1, offset=-1)
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)
        self.top = Perceptron(places, (width + len(rows), 32, 16, 1))

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x = self.bottom(dense)
        vectors = [table(sparse[:, index]) for index, table in enumerate(self.tables)]
        stacked = torch.cat([x, *vectors], dim=1).view(x.size(0), -1, x.size(1))
        pairs = torch.bmm(stacked, stacked.transpose(1, 2))
        return torch.sigmoid(self.top(torch.cat([x, pairs[:, self.rows, self.columns]], dim=1)))


class NCF(nn.Module):
    """Neural matrix factorisation: a product of embeddings beside a perceptron."""

    def __init__(self, places: Places, width: int = 16):
        super().__init__()
        self.user, self.item, self.user_deep, self.item_deep = (nn.Embedding(USERS, width) for _ in range(4))
        self.factors = places.noise("hidden", width)
        self.deep = nn.Sequential(Dense(places, 2 * width, 32), Dense(places, 32, 16), Dense(places, 16, 8))
        self.head = nn.Linear(width + 8, 1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        factors = self.factors(self.user(user) * self.item(item))
        deep = self.deep(torch.cat([self.user_deep(user), self.item_deep(item)], dim=-1))
        return torch.sigmoid(self.head(torch.cat([factors, deep], dim=-1))).squeeze(-1)


class WideDeep(nn.Module):
    """A linear model of crossed features beside embeddings and a perceptron with batch norms."""

    def __init__(self, places: Places, fields: int = 4, width: int = 8):
        super().__init__()
        self.wide = nn.Linear(20, 1)
        self.embed = nn.Embedding(fields * USERS, width)
        self.register_buffer("offsets", torch.arange(fields) * USERS)
        inputs = fields * width + 6
        self.deep = nn.Sequential(
            Dense(places, inputs, 32, norm=True),
            nn.Dropout(),
            Dense(places, 32, 24, norm=True),
            nn.Linear(24, 1),
        )

    def forward(self, crossed: Tensor, fields: Tensor, numbers: Tensor) -> Tensor:
        vectors = self.embed(fields + self.offsets).flatten(1)
        return self.wide(crossed) + self.deep(torch.cat([vectors, numbers], 1))


class DeepFM(nn.Module):
    """Factorisation machine (square of the sum less the sum of squares) and a perceptron on one embedding."""

    def __init__(self, places: Places, fields: int = 4, width: int = 12):
        super().__init__()
        self.embed, self.linear = nn.Embedding(USERS, width), nn.Embedding(USERS, 1)
        self.vectors = places.noise("hidden", width, -1)
        self.deep = Perceptron(places, (fields * width, 32, 24, 1))

    def forward(self, fields: Tensor) -> Tensor:
        vectors = self.vectors(self.embed(fields))
        pairs = 0.5 * (vectors.sum(1).pow(2) - vectors.pow(2).sum(1)).sum(1, keepdim=True)
        return self.linear(fields).sum(1) + pairs + self.deep(vectors.flatten(1))


class CrossNetwork(nn.Module):
    """DCN v2: x0 * (W x + b) + x, three times, beside a perceptron."""

    def __init__(self, places: Places, width: int = 24, layers: int = 3):
        super().__init__()
        self.cross = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.add = nn.ModuleList(Add(places, width) for _ in range(layers))
        self.deep = nn.Sequential(Dense(places, width, 32), Dense(places, 32, 16))
        self.head = nn.Linear(width + 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for cross, add in zip(self.cross, self.add, strict=True):
            y = add(x * cross(y), y)
        return torch.sigmoid(self.head(torch.cat([y, self.deep(x)], 1)))


class PointTransform(nn.Module):
    """PointNet's T-net: a matrix for each cloud, the identity added."""

    def __init__(self, places: Places, size: int):
        super().__init__()
        self.size = size
        self.points = nn.Sequential(Unit(places, size, 16, 1, dims=1), Unit(places, 16, 32, 1, dims=1))
        self.matrix = nn.Sequential(Dense(places, 32, 24, norm=True), nn.Linear(24, size * size))

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.matrix(torch.max(self.points(x), 2, keepdim=True)[0].view(-1, 32))
        matrix = matrix.view(-1, self.size, self.size) + torch.eye(self.size, dtype=x.dtype)
        return torch.bmm(x.transpose(2, 1), matrix).transpose(2, 1)


class PointNet(nn.Module):
    """The coordinates and the features are turned, then shared layers and a maximum over points."""

    def __init__(self, places: Places):
        super().__init__()
        self.turn, self.turn_features = PointTransform(places, 3), PointTransform(places, 16)
        self.first = Unit(places, 3, 16, 1, dims=1)
        self.rest = nn.Sequential(Unit(places, 16, 32, 1, dims=1), Unit(places, 32, 48, 1, act=None, dims=1))
        self.head = nn.Sequential(Dense(places, 48, 32, norm=True), nn.Dropout(0.3), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.turn_features(self.first(self.turn(x)))
        return F.log_softmax(self.head(torch.max(self.rest(x), 2)[0]), dim=1)


class DeepSets(nn.Module):
    """A sum over the elements between two perceptrons."""

    def __init__(self, places: Places):
        super().__init__()
        self.element = nn.Sequential(Dense(places, 6, 32), Dense(places, 32, 32))
        self.whole = Perceptron(places, (32, 24, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(self.element(x).sum(dim=1))


def adjacency(nodes: int) -> Tensor:
    """A ring with chords, normalised by degrees on both sides, shape (nodes, nodes)."""
    links = torch.eye(nodes)
    for step in (1, 3):
        links += torch.roll(torch.eye(nodes), step, 0) + torch.roll(torch.eye(nodes), -step, 0)
    degrees = links.sum(1).rsqrt()
    return degrees[:, None] * links * degrees[None, :]


class GraphConvolution(nn.Module):
    """The same graph for every example: adjacency @ x @ weight."""

    def __init__(self, places: Places, inputs: int, outputs: int, links: Tensor):
        super().__init__()
        self.register_buffer("links", links)
        self.layer = Dense(places, inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(self.links, self.layer(x))


def gcn(places: Places, nodes: int = 12) -> nn.Module:
    links = adjacency(nodes)
    return nn.Sequential(
        GraphConvolution(places, 8, 24, links),
        nn.Dropout(),
        GraphConvolution(places, 24, 24, links),
        nn.Linear(24, 5),
    )


class GraphAttention(nn.Module):
    """GAT: scores of pairs of nodes, a softmax over neighbours, several heads side by side."""

    def __init__(self, places: Places, inputs: int, width: int, heads: int, links: Tensor):
        super().__init__()
        self.heads, self.width = heads, width
        self.register_buffer("missing", links == 0)
        self.layer = Dense(places, inputs, heads * width, act=None)
        self.values = places.noise("hidden", heads * width, -1)
        self.source, self.target = (nn.Parameter(torch.randn(heads, width) * 0.3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        batch, nodes, _ = x.shape
        h = self.layer(x).view(batch, nodes, self.heads, self.width)
        source = torch.einsum("bnhd,hd->bhn", h, self.source)
        target = torch.einsum("bnhd,hd->bhn", h, self.target)
        scores = F.leaky_relu(source[..., :, None] + target[..., None, :], 0.2)
        weights = scores.masked_fill(self.missing, float("-inf")).softmax(-1)
        out = torch.einsum("bhnm,bmhd->bnhd", weights, h)
        return self.values(F.elu(out.reshape(batch, nodes, self.heads * self.width)))


def gat(places: Places, nodes: int = 12) -> nn.Module:
    links = adjacency(nodes)
    return nn.Sequential(
        GraphAttention(places, 8, 8, 3, links), GraphAttention(places, 24, 8, 3, links), nn.Linear(24, 5)
    )


class TabularResNet(nn.Module):
    """Batch norm, linear, relu, linear, the input added (Gorishniy et al. 2021)."""

    def __init__(self, places: Places, width: int = 24, blocks: int = 3):
        super().__init__()
        self.entry = nn.Linear(16, width)
        self.bodies = nn.ModuleList(
            nn.Sequential(nn.BatchNorm1d(width), Dense(places, width, 2 * width), nn.Linear(2 * width, width))
            for _ in range(blocks)
        )
        self.adds = nn.ModuleList(Add(places, width) for _ in range(blocks))
        self.head = nn.Sequential(nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        for body, add in zip(self.bodies, self.adds, strict=True):
            x = add(body(x), x)
        return self.head(x)


ARCHITECTURES = (
    Architecture("siamese", "Two-tower (siamese)", Siamese, floats((3, 32, 32), (3, 32, 32))),
    Architecture("two_tower", "Two-tower", TwoTower, mixed(tokens(USERS, (5,)), floats((20,)))),
    Architecture("dlrm", "DLRM", DLRM, mixed(floats((10,)), tokens(USERS, (3,)))),
    Architecture("ncf", "NCF", NCF, tokens(USERS, (), ())),
    Architecture(
        "wide_deep", "Wide & Deep", WideDeep, mixed(floats((20,)), tokens(USERS, (4,)), floats((6,)))
    ),
    Architecture("deepfm", "DeepFM", DeepFM, tokens(USERS, (4,))),
    Architecture("dcn", "DCN v2", CrossNetwork, floats((24,))),
    Architecture("pointnet", "PointNet", PointNet, floats((3, 40))),
    Architecture("deep_sets", "Deep Sets", DeepSets, floats((10, 6))),
    Architecture("gcn", "Graph convolution", gcn, floats((12, 8))),
    Architecture("gat", "Graph attention", gat, floats((12, 8))),
    Architecture("tabular_resnet", "Tabular ResNet", TabularResNet, floats((16,))),
)
