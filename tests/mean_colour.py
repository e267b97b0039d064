"""A third task in one file: tell an image's mean colour. ``python tests/mean_colour.py`` takes main.py's flags."""

import sys

import torch

from data import Sample, build_eval_loader, build_train_loader
from data.augmentation import DeviceStage, build_eval_transform
from data.decoding import build_decoding, decode
from data.splits import open_images
from engine.evaluate import run_evaluation
from engine.train import train
from main import parse
from models import build_model, load_weights
from tasks import Loaders
from utils import checkpoint, distributed


class MeanColour:
    best_is, best_title, teacher = "minus_error", "negative error", None

    def __init__(self, config, device):
        self.config, self.device, self.resize = config, device, build_eval_transform(config)
        self.stage = DeviceStage(device, config.DATA.MEAN, config.DATA.STD)

    def model(self):
        return build_model(self.config, 3)

    def sample(self, raw, look):
        image = decode(raw[0], build_decoding(self.config))
        return Sample(self.resize(image)[0], image.float().mean((1, 2)) / 255)

    def train_loaders(self):
        parts, (train_index, val_index, _) = (self.sample, self.resize.size, self.stage), open_images(self.config, True)
        train_loader = build_train_loader(self.config, train_index, *parts)
        return Loaders(train_loader, build_eval_loader(self.config, val_index, *parts), "mean colours")

    def eval_loader(self, content, weights, path):
        index = open_images(self.config, training=False)[1]
        return build_eval_loader(self.config, index, self.sample, self.resize.size, self.stage), []

    def prepare(self, batch):
        return batch._replace(images=batch.images + 0.01 * torch.randn_like(batch.images))

    def loss(self, model, batch):
        error = torch.nn.functional.mse_loss(model(batch.images), batch.targets)
        return error, {"squared": error}

    def evaluator(self, report=False):
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        return self

    def facts(self):
        return {}

    def check(self, content, path):
        pass

    def start_from(self, model, content, path):
        return load_weights(model, checkpoint.state_dict_of(content, path), path, allow_new_head=True).notes

    def add(self, model, batch):
        error = (model(batch.images).float() - batch.targets).abs().mean(1).double().sum()
        self.sums += torch.stack([error, torch.full_like(error, len(batch.images))])

    def result(self):
        error, images = distributed.sum_over_ranks(self.sums.clone()).tolist()
        return {"minus_error": -error / images, "images": int(images)}

    def pictures(self):
        return {}

    def describe(self, result):
        return f"error {-result['minus_error']:.4f}"


if __name__ == "__main__":
    config, mode = parse(sys.argv[1:])
    (train if mode == "train" else run_evaluation)(config, distributed.start(), choose_task=MeanColour)
