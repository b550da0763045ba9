"""Synthetic street views in the raw format of the 3D Street View dataset: tars of JPEGs with label files.

A street is drawn once as a strip of facades; a view is that strip under the homography of a pinhole camera that
looks at a target on a facade, with its own light, season, trees and cars. Labels agree with the geometry.

Writes   <out>/0088.tar, 0089.tar, ...: one tar per city (= dataset)
Command  python tests/synthetic.py --out data/raw --streets 80 --cities 4 --seed 0 --processes 2
Size     about 57 images of 40 kB per street (640 px), 1 s per street and core; --image-px 96 is far faster

The same parameters give the same bytes. A street is drawn from its own seed (seed, city, street), so a larger set
contains the first streets of a smaller one. `--damage` adds bad files of every kind that a reader must reject and
odd ones that it must keep; the images without damage are the same with it.
"""

import argparse
import colorsys
import io
import json
import logging
import math
import multiprocessing
import os
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

LOG = logging.getLogger("synthetic")
FIRST_DATASET = 88
CITIES = (  # latitude, longitude, altitude (m)
    (40.7420, -73.9890, 15.0),
    (48.8650, 2.3450, 40.0),
    (-37.8130, 144.9630, 25.0),
    (51.5140, -0.0980, 20.0),
    (37.7790, -122.4180, 30.0),
    (41.8840, -87.6320, 180.0),
    (43.7720, 11.2530, 50.0),
    (35.6810, 139.7660, 5.0),
)
METRES_PER_DEGREE = 111_195.0  # of latitude, on a sphere of 6,371 km
STREET_SPACING_M = 300.0
STREETS_PER_ROW = 8
PANORAMA_SPACING_M = 2.5
TARGET_SPACING_M = 2.5
MAX_OBLIQUE_DEG = 83.0  # between a ray and the facade's normal, seen from above; at 90 the homography wraps
STRIP_PX_PER_M = 24.0  # for images of 640 px
STRIP_MARGIN_M, STRIP_TOP_M, STRIP_BOTTOM_M = 8.0, 26.0, -1.0
RENDER_SHARE = 0.7  # views are drawn smaller and enlarged: half the time, and no sharper than a photograph
STREET_PATCHES = 10_000  # patch ids of street n start at n times this; extra images at + 5,000
STREET_IDS = 1_000  # the same for targets and panoramas
COLUMNS = (
    "tar member dataset_id target_id patch_id street_view_id street city target_lat target_lon target_height "
    "camera_lat camera_lon heading pitch distance aligned kind"
).split()
LABEL_IDS = "dataset_id target_id patch_id street_view_id".split()  # the file name has the target last
LABEL_NUMBERS = (
    "target_lat target_lon target_height normal_x normal_y normal_z camera_lat camera_lon camera_height "
    "distance heading pitch roll"
).split()


@dataclass(frozen=True)
class Truth:
    """What was planted: valid images, rejects (tar, member, reason), regular files by their fate per tar."""

    images: pd.DataFrame
    rejects: pd.DataFrame
    members: dict[str, dict[str, int]]

    def save(self, folder: Path) -> None:
        """images.parquet, rejects.parquet and members.json in a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self.images.to_parquet(folder / "images.parquet", index=False)
        self.rejects.to_parquet(folder / "rejects.parquet", index=False)
        (folder / "members.json").write_text(json.dumps(self.members, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------- geometry
# Street coordinates, metres: s along the facades (to the right for who looks at them), t from the facades into
# the street, z up from the ground. The facades lie in the plane t = 0.


def rays(camera: np.ndarray, target: np.ndarray, focal_px: float, px: int) -> np.ndarray:
    """(3, 3) matrix from a pixel (u, v, 1) to its ray's direction (s, t, z); the target is in the centre."""
    forward = (target - camera) / np.linalg.norm(target - camera)
    right = np.array([-forward[1], forward[0], 0.0]) / math.hypot(forward[0], forward[1])
    up = np.cross(forward, right)
    return np.stack([right, -up, focal_px * forward - px / 2 * right + px / 2 * up], axis=1)


def strip_homography(camera: np.ndarray, ray: np.ndarray, px_per_m: float) -> np.ndarray:
    """(3, 3) matrix from a view's pixel to the strip's pixel: where its ray meets the plane t = 0."""
    along = camera[0] * ray[1] - camera[1] * ray[0]  # s times ray[1]
    above = camera[2] * ray[1] - camera[1] * ray[2]
    rows = [(along + STRIP_MARGIN_M * ray[1]) * px_per_m, (STRIP_TOP_M * ray[1] - above) * px_per_m, ray[1]]
    return np.stack(rows) / ray[1, 2]


def is_seen(camera: np.ndarray, target: np.ndarray, focal_share: float) -> bool:
    """Whether all corners of the view meet the facade's plane well in front of the camera."""
    corners = rays(camera, target, focal_share, 1) @ [[0, 1, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1]]
    oblique_deg = np.degrees(np.arctan2(np.abs(corners[0]), -corners[1]))
    return bool((oblique_deg < MAX_OBLIQUE_DEG).all())


@dataclass(frozen=True)
class Place:
    """Where a street lies: its origin (s = t = 0) and the bearing of +s in degrees."""

    lat: float
    lon: float
    altitude_m: float
    azimuth_deg: float

    def to_degrees(self, s: float, t: float) -> tuple[float, float]:
        """Latitude and longitude of a point of the street."""
        east, north = self.turn(s, t)
        lon = self.lon + east / (METRES_PER_DEGREE * math.cos(math.radians(self.lat)))
        return self.lat + north / METRES_PER_DEGREE, lon

    def turn(self, s: float, t: float) -> tuple[float, float]:
        """(s, t) as (east, north)."""
        sin, cos = math.sin(math.radians(self.azimuth_deg)), math.cos(math.radians(self.azimuth_deg))
        return s * sin + t * cos, s * cos - t * sin


def place_street(city: int, street: int, azimuth_deg: float, length_m: float) -> Place:
    """Street n of a city, its middle on the grid point n (STREETS_PER_ROW to a row, northwards)."""
    lat, lon, altitude_m = CITIES[city % len(CITIES)]
    lon += 0.5 * (city // len(CITIES))
    row, column = divmod(street, STREETS_PER_ROW)
    middle = Place(lat + row * STREET_SPACING_M / METRES_PER_DEGREE, lon, altitude_m, 90.0)
    middle = replace(middle, lon=middle.to_degrees(column * STREET_SPACING_M, 0)[1], azimuth_deg=azimuth_deg)
    start_lat, start_lon = middle.to_degrees(-length_m / 2, 0)
    return replace(middle, lat=start_lat, lon=start_lon)


# ----------------------------------------------------------------------------------------------------- drawing


@dataclass(frozen=True)
class Style:
    """How a facade looks; lengths in metres, colours as (r, g, b)."""

    wall: tuple[int, int, int]
    trim: tuple[int, int, int]
    glass: tuple[int, int, int]
    accent: tuple[int, int, int]  # shutters, doors, shop signs
    brick: tuple[float, float, float]  # width, height, contrast
    storeys: int
    storey_m: float
    bay_m: float
    window: tuple[float, float]  # shares of bay and storey
    roof: str
    shutters: bool
    shop: bool
    rails: bool


def hsv(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    """A colour as 0..255; the hue wraps."""
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def shade(colour: tuple[int, ...], factor: float) -> tuple[int, int, int]:
    """The colour, lighter or darker."""
    return tuple(min(255, max(0, round(c * factor))) for c in colour[:3])


def street_style(rng: np.random.Generator) -> Style:
    """What the facades of a street have in common."""
    hue = rng.choice([0.03, 0.07, 0.1, 0.13, 0.3, 0.55, 0.6, 0.75]) + rng.normal(0, 0.02)
    return Style(
        wall=hsv(hue, rng.uniform(0.08, 0.4), rng.uniform(0.45, 0.85)),
        trim=hsv(rng.random(), rng.uniform(0, 0.3), rng.choice([0.3, 0.9])),
        glass=hsv(rng.uniform(0.5, 0.7), 0.35, rng.uniform(0.15, 0.4)),
        accent=hsv(rng.random(), rng.uniform(0.4, 0.9), rng.uniform(0.3, 0.7)),
        brick=[(0.5, 0.17, 0.1), (1.2, 0.45, 0.08), (9.0, 0.22, 0.05), (2.0, 1.5, 0.02)][rng.integers(4)],
        storeys=int(rng.integers(2, 6)),
        storey_m=rng.uniform(2.9, 3.6),
        bay_m=rng.uniform(2.0, 3.2),
        window=(rng.uniform(0.4, 0.65), rng.uniform(0.45, 0.65)),
        roof=str(rng.choice(["flat", "mansard", "gable"])),
        shutters=bool(rng.random() < 0.4),
        shop=bool(rng.random() < 0.5),
        rails=bool(rng.random() < 0.4),
    )


def facade_style(rng: np.random.Generator, base: Style) -> Style:
    """A facade of a street: a row house of the street's own style, or a variation on it."""
    other = street_style(rng)
    if rng.random() < 0.3:
        return replace(base, accent=other.accent, shop=other.shop)
    mix = rng.uniform(0.1, 0.7)
    wall = tuple(round((1 - mix) * a + mix * b) for a, b in zip(base.wall, other.wall, strict=True))
    changes = {"wall": wall, "accent": other.accent, "shop": other.shop, "rails": other.rails}
    for name in ("trim", "brick", "roof", "shutters", "window", "bay_m", "glass"):
        if rng.random() < 0.35:
            changes[name] = getattr(other, name)
    storeys = int(np.clip(base.storeys + rng.integers(-1, 2), 2, 6))
    return replace(base, storeys=storeys, storey_m=base.storey_m * rng.uniform(0.93, 1.07), **changes)


class Strip:
    """A street's facades as one RGBX picture (X: 255 in the sky); drawn in metres, s to the right, z up."""

    def __init__(self, length_m: float, px_per_m: float):
        self.px_per_m = px_per_m
        size = (length_m + 2 * STRIP_MARGIN_M) * px_per_m, (STRIP_TOP_M - STRIP_BOTTOM_M) * px_per_m
        # RGBX, not RGBA: PIL would multiply by alpha before and after each transform, a third of a view's time
        self.image = Image.new("RGBX", (math.ceil(size[0]), math.ceil(size[1])), (0, 0, 0, 255))
        self.pen = ImageDraw.Draw(self.image)

    def at(self, s: float, z: float) -> tuple[int, int]:
        """The pixel of a point of the facades."""
        return round((s + STRIP_MARGIN_M) * self.px_per_m), round((STRIP_TOP_M - z) * self.px_per_m)

    def box(self, s: float, z: float, width: float, height: float, colour: tuple[int, int, int]) -> None:
        """A filled rectangle from its lower left corner."""
        self.pen.rectangle([self.at(s, z + height), self.at(s + width, z)], fill=(*colour, 0))

    def polygon(self, points: list[tuple[float, float]], colour: tuple[int, int, int]) -> None:
        """A filled polygon of (s, z) corners."""
        self.pen.polygon([self.at(*point) for point in points], fill=(*colour, 0))

    def bricks(self, rng: np.random.Generator, s: float, width: float, height: float, style: Style) -> None:
        """A wall from the strip's bottom to `height`, brick by brick in its own brightness."""
        brick_width, brick_height, contrast = style.brick
        (left, top), (right, bottom) = self.at(s, height), self.at(s + width, STRIP_BOTTOM_M)
        rows = (np.arange(bottom - top) / (brick_height * self.px_per_m)).astype(int)
        columns = np.arange(right - left) / (brick_width * self.px_per_m) + 0.5 * (rows % 2)[:, None]
        bricks_shape = (int(40 / brick_height), int(25 / brick_width) + 2)  # the same draws at every resolution
        factor = rng.normal(1, contrast, bricks_shape)[rows[:, None], columns.astype(int)]
        factor[np.diff(rows, prepend=-1) > 0] *= 1 - 2 * contrast
        pixels = np.zeros((*factor.shape, 4), np.uint8)
        pixels[..., :3] = np.clip(factor[..., None] * style.wall, 0, 255)
        self.image.paste(Image.frombytes("RGBX", pixels.shape[1::-1], pixels.tobytes()), (left, top))


def draw_window(strip: Strip, rng: np.random.Generator, s: float, z: float, size: tuple, style: Style) -> None:
    """A window with frame, sill, glass or curtain, and what the style puts around it."""
    width, height = size
    if style.shutters:
        strip.box(s - 0.45 * width, z, 1.9 * width, height, style.accent)
    strip.box(s - 0.1, z - 0.1, width + 0.2, height + 0.2, style.trim)
    curtain = hsv(rng.uniform(0, 0.2), rng.uniform(0, 0.5), rng.uniform(0.3, 0.9))
    strip.box(s, z, width, height, curtain if rng.random() < 0.25 else shade(style.glass, rng.uniform(0.8, 1.3)))
    strip.box(s + width / 2 - 0.03, z, 0.06, height, style.trim)
    strip.box(s, z + 0.6 * height, width, 0.06, style.trim)
    strip.box(s - 0.15, z - 0.2, width + 0.3, 0.15, shade(style.trim, 0.8))
    if style.rails:
        for bar in np.linspace(s - 0.1, s + width + 0.1, 7):
            strip.box(bar, z - 0.2, 0.03, 0.45 * height, (40, 40, 45))


def draw_ground_floor(strip: Strip, rng: np.random.Generator, s: float, width: float, style: Style) -> None:
    """A shop with its sign, or windows, and a door."""
    door = s + rng.uniform(0.1, 0.8) * (width - 1.5)
    if style.shop:
        strip.box(s + 0.4, 0.3, width - 0.8, 2.2, shade(style.glass, 0.8))
        for goods in s + 0.6 + rng.random(8) * (width - 2):
            colour = hsv(rng.random(), rng.uniform(0.2, 0.8), rng.uniform(0.3, 0.8))
            strip.box(goods, 0.5, rng.uniform(0.3, 0.8), rng.uniform(0.4, 1.6), colour)
        strip.box(s + 0.4, 2.5, width - 0.8, 0.8, shade(style.accent, 1.1))
        for letter in np.arange(s + 0.8, s + width - 1.2, 0.45):
            if rng.random() < 0.8:
                strip.box(letter, 2.65, rng.uniform(0.1, 0.3), rng.uniform(0.2, 0.5), style.trim)
    else:
        for bay in np.arange(s + 0.6, s + width - style.bay_m, style.bay_m):
            size = style.window[0] * style.bay_m, style.window[1] * style.storey_m
            draw_window(strip, rng, bay + 0.3, 0.9, size, style)
    strip.box(door - 0.15, 0, 1.4, 2.5, style.trim)
    strip.box(door, 0, 1.1, 2.3, shade(hsv(rng.random(), 0.6, 0.5), 1.0))
    strip.box(s, STRIP_BOTTOM_M, width, 0.3 - STRIP_BOTTOM_M, shade(style.wall, 0.6))


def draw_facade(strip: Strip, rng: np.random.Generator, s: float, width: float, style: Style) -> float:
    """Draws a facade from s to s + width; returns the height of its wall in metres."""
    height = 0.4 + style.storeys * style.storey_m
    if style.roof == "gable":
        peak = height + min(0.3 * width, 5.0)
        strip.polygon([(s, height), (s + width / 2, peak), (s + width, height)], shade(style.wall, 0.9))
    elif style.roof == "mansard":
        strip.polygon([(s, height), (s + 0.5, height + 2), (s + width - 0.5, height + 2), (s + width, height)],
                      shade(style.glass, 0.9))  # fmt: skip
    chimney = s + rng.uniform(0.1, 0.8) * width
    strip.box(chimney, height, 0.8, rng.uniform(0.5, 2.5), hsv(0.03, 0.5, rng.uniform(0.3, 0.6)))
    strip.bricks(rng, s, width, height, style)
    bays = max(1, int((width - 0.6) / style.bay_m))
    bay_m = (width - 0.6) / bays
    size = style.window[0] * bay_m, style.window[1] * style.storey_m
    for floor in range(1, style.storeys):
        for bay in range(bays):
            left = s + 0.3 + (bay + 0.5) * bay_m - size[0] / 2
            draw_window(strip, rng, left, floor * style.storey_m + 0.9, size, style)
    draw_ground_floor(strip, rng, s, width, style)
    strip.box(s - 0.1, height - 0.3, width + 0.2, 0.4, style.trim)
    strip.box(s + width - 0.2, 0, 0.12, height, shade(style.wall, 0.5))
    return height


@dataclass(frozen=True)
class Street:
    """A drawn street; facades are (start, width, height) in metres."""

    strip: Strip
    facades: list[tuple[float, float, float]]
    trees: np.ndarray  # (n,) s in metres
    length_m: float


def draw_street(rng: np.random.Generator, facades: int, image_px: int) -> Street:
    """A row of facades that share a style, and the places of its trees."""
    widths = rng.uniform(8, 20, facades)
    strip = Strip(widths.sum(), max(6.0, STRIP_PX_PER_M * image_px / 640))
    base, s, drawn = street_style(rng), 0.0, []
    for width in widths:
        drawn.append((s, width, draw_facade(strip, rng, s, width, facade_style(rng, base))))
        s += width
    trees = rng.uniform(0, s, rng.integers(0, 2 + int(s / 15)))
    return Street(strip, drawn, trees, s)


@dataclass(frozen=True)
class Panorama:
    """A camera position and its moment."""

    position: np.ndarray  # s, t, z in metres
    focal_share: float  # focal length over image width
    season: int  # of LEAVES
    sky: tuple[tuple[int, int, int], tuple[int, int, int]]  # above, at the horizon
    light: tuple[float, float, float, float]  # gains of red, green, blue; gamma
    cars: tuple[tuple[float, int], ...]  # s in metres, colour


LEAVES = ((70, 120, 50), (110, 150, 70), (190, 110, 40), None)  # summer, spring, autumn, winter
CAR_COLOURS = ((30, 60, 150), (150, 30, 30), (200, 200, 205), (40, 40, 45), (90, 110, 90))


def take_panorama(rng: np.random.Generator, s: float) -> Panorama:
    """A camera near s on the street, at a random hour of a random season."""
    position = np.array([s + rng.uniform(-1, 1), rng.uniform(7.5, 16), rng.uniform(2.2, 2.8)])
    focal_share = 0.5 / math.tan(math.radians(rng.uniform(48, 64) / 2))
    clear = rng.random()
    sky = hsv(0.6, 0.55 * clear, 0.85), hsv(0.58, 0.2 * clear, 0.9)
    brightness, warmth, tint = rng.uniform(0.5, 1.25), rng.normal(0, 0.1), rng.normal(0, 0.04)
    light = brightness * (1 + warmth), brightness * (1 + tint), brightness * (1 - warmth), rng.uniform(0.75, 1.3)
    cars = tuple((position[0] + rng.uniform(-12, 12), int(rng.integers(5))) for _ in range(rng.integers(0, 3)))
    return Panorama(position, focal_share, int(rng.integers(4)), sky, light, cars)


@lru_cache(maxsize=512)
def tree_sprite(variant: int, season: int, height_px: int) -> Image.Image:
    """A tree as RGBA, three quarters as wide as high."""
    rng = np.random.default_rng(variant)
    width = max(1, height_px * 3 // 4)
    image = Image.new("RGBA", (width, height_px))
    pen = ImageDraw.Draw(image)
    trunk = (85, 65, 50, 255)
    pen.rectangle([width * 0.46, height_px * 0.4, width * 0.54, height_px], fill=trunk)
    tips = rng.normal([0.5, 0.28], [0.15, 0.09], (60, 2)).clip(0.1, 0.9) * (width, height_px)
    for x, y in tips[:25]:
        pen.line([width / 2, height_px * 0.6, x, y], fill=trunk, width=max(1, height_px // 100))
    for (x, y), factor in zip(tips, rng.uniform(0.7, 1.2, 60), strict=True):
        if LEAVES[season]:
            radius = 0.1 * width * factor
            pen.ellipse(
                [x - radius, y - radius, x + radius, y + radius], fill=(*shade(LEAVES[season], factor), 255)
            )
    return image


@lru_cache(maxsize=512)
def car_sprite(colour: int, height_px: int) -> Image.Image:
    """A car from its side as RGBA, three times as wide as high."""
    image = Image.new("RGBA", (3 * height_px, height_px))
    pen = ImageDraw.Draw(image)
    unit = height_px / 10
    body, glass, tyre = (*CAR_COLOURS[colour], 255), (50, 60, 70, 255), (20, 20, 20, 255)
    pen.polygon([(x * unit, y * unit) for x, y in ((5, 4), (9, 0), (20, 0), (25, 4))], fill=body)
    pen.polygon([(x * unit, y * unit) for x, y in ((7, 4), (10, 1), (19, 1), (23, 4))], fill=glass)
    pen.rounded_rectangle([0, 4 * unit, 30 * unit - 1, 8.5 * unit], radius=1.5 * unit, fill=body)
    for x in (4, 21):
        pen.ellipse([x * unit, 6 * unit, (x + 4) * unit, 10 * unit - 1], fill=tyre)
    return image


@lru_cache(maxsize=4)
def noise_tile(px: int) -> Image.Image:
    """Sensor noise around 128, twice as wide and high as a view, which takes a random crop."""
    noise = np.random.default_rng(0).normal(128, 4, (2 * px, 2 * px, 3))
    return Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8))


def render_view(street: Street, panorama: Panorama, target: np.ndarray, image_px: int,
                rng: np.random.Generator) -> Image.Image:  # fmt: skip
    """The target (s, 0, z in metres) in the centre of a square image."""
    px = round(RENDER_SHARE * image_px)
    focal_px, camera = panorama.focal_share * px, panorama.position
    ray = rays(camera, target, focal_px, px)
    homography = strip_homography(camera, ray, street.strip.px_per_m)
    size = (px, px)
    view = street.strip.image.transform(
        size,
        Image.Transform.PERSPECTIVE,
        homography.ravel()[:8],
        Image.Resampling.BILINEAR,
        fillcolor=(0, 0, 0, 255),
    )
    sky_mask = view.getchannel(3)
    view = view.convert("RGB")
    view.paste(ImageOps.colorize(Image.linear_gradient("L").resize(size), *panorama.sky), (0, 0), sky_mask)

    pen = ImageDraw.Draw(view)
    for kerb_m, colour in ((0.0, (135, 130, 122)), (3.0, (92, 92, 96))):  # pavement, road
        a, b, c = camera[2] * ray[1] - (camera[1] - kerb_m) * ray[2]  # z times ray[1], on the plane t = kerb_m
        pen.polygon([(0, -c / b), (px, -(a * px + c) / b), (px, 2 * px), (0, 2 * px)], fill=colour)
    to_view = np.linalg.inv(ray)

    def place(sprite: Callable[[int], Image.Image], s: float, t: float, height_m: float) -> None:
        foot = to_view @ (np.array([s, t, 0.0]) - camera)
        if foot[2] > 0.1 / focal_px:  # in front of the camera
            u, v = foot[:2] / foot[2]
            height_px = 4 * max(1, round(height_m * focal_px / np.linalg.norm([s, t, 0] - camera) / 4))
            drawn = sprite(min(height_px, 4 * px))
            view.paste(drawn, (round(u - drawn.width / 2), round(v - drawn.height)), drawn)

    for number, s in enumerate(street.trees):
        place(lambda height, n=number: tree_sprite(n % 5, panorama.season, height), s, 2.5, 5 + number % 3)
    for s, colour in panorama.cars:
        place(lambda height, c=colour: car_sprite(c, height), s, 4.5, 1.5)

    steps = np.linspace(0, 1, 256) ** panorama.light[3] * 255
    view = view.point([min(255, round(gain * step)) for gain in panorama.light[:3] for step in steps])
    tile, (x, y) = noise_tile(px), rng.integers(0, px, 2).tolist()
    view = ImageChops.add(view, tile.crop((x, y, x + px, y + px)), offset=-128)
    if rng.random() < 0.15:
        view = view.filter(ImageFilter.BoxBlur(px / 400))
    return view.resize((image_px, image_px), Image.Resampling.BILINEAR)


# ------------------------------------------------------------------------------------------- images and labels


@dataclass
class Pair:
    """An image and its label on their way into a tar; None stands for a file that is left out."""

    row: dict  # COLUMNS but tar and member, the label's other numbers, and alignment: text of the `a` line
    image: bytes | None
    label: bytes | None
    stem: str
    suffix: str = ".jpg"
    image_reason: str = ""
    label_reason: str = ""


@dataclass(frozen=True)
class Settings:
    """What decides the content of a street besides its number."""

    seed: int
    damage: bool
    image_px: int
    targets_per_facade: tuple[int, int]
    facades_per_street: int
    views: tuple[int, int]


def name_of(row: dict) -> str:
    """DatasetID_PatchID_StreetViewID_TargetID: the target is last, unlike in the label."""
    return f"{row['dataset_id']:04d}_{row['patch_id']}_{row['street_view_id']}_{row['target_id']}"


def label_of(row: dict, number: Callable[[float], str] = repr, blank: str = " ", end: str = "\n") -> bytes:
    """The label file: the `d` line and, for an aligned image, the `a` line."""
    numbers = [str(row[name]) for name in LABEL_IDS] + [number(float(row[name])) for name in LABEL_NUMBERS]
    lines = [blank.join(["d", *numbers]), *([row["alignment"]] if row["aligned"] else [])]
    return (end.join(lines) + end).encode()


def jpeg_of(image: Image.Image, quality: int) -> bytes:
    """The image as JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def street_pairs(settings: Settings, city: int, number: int) -> list[Pair]:
    """All images of a street with their labels, without damage."""
    rng = np.random.default_rng([settings.seed, city, number])
    street = draw_street(rng, settings.facades_per_street, settings.image_px)
    place = place_street(city, number, rng.uniform(0, 360), street.length_m)
    stops = np.arange(-STRIP_MARGIN_M, street.length_m + STRIP_MARGIN_M, PANORAMA_SPACING_M)
    panoramas = [take_panorama(rng, s) for s in stops]
    pairs, target_id = [], number * STREET_IDS
    for start, width, height in street.facades:
        lowest, highest = settings.targets_per_facade
        count = int(rng.integers(lowest, highest + 1, 2).min())  # few targets are more frequent
        free_m = width - TARGET_SPACING_M * count  # half a spacing at both ends
        if free_m < 0:
            raise ValueError(f"{count} targets do not fit on a facade of {width:.1f} m")
        for s in start + TARGET_SPACING_M * (0.5 + np.arange(count)) + np.sort(rng.uniform(0, free_m, count)):
            target = np.array([s, 0.0, rng.uniform(1.5, min(height - 0.5, 6.5))])
            seeing = [n for n, p in enumerate(panoramas) if is_seen(p.position, target, p.focal_share)]
            wanted = int(rng.integers(settings.views[0], settings.views[1] + 1))
            for view in sorted(rng.choice(seeing, min(wanted, len(seeing)), replace=False).tolist()):
                image = render_view(street, panoramas[view], target, settings.image_px, rng)
                row = describe(place, panoramas[view].position, target) | {
                    "dataset_id": FIRST_DATASET + city,
                    "target_id": target_id,
                    "patch_id": number * STREET_PATCHES + len(pairs),
                    "street_view_id": number * STREET_IDS + view,
                    "street": number,
                    "city": city,
                    "aligned": bool(rng.random() < 0.4),
                    "alignment": "a " + " ".join(f"{x:.6g}" for x in rng.normal(0, 20, 11)),
                    "kind": "plain",
                }
                pairs.append(Pair(row, jpeg_of(image, int(rng.integers(62, 80))), label_of(row), name_of(row)))
            target_id += 1
    return pairs


def describe(place: Place, camera: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """A label's numbers, rounded to 1 mm and 0.0001 degrees; camera and target in street coordinates."""
    ds, dt, dz = target - camera
    east, north = place.turn(ds, dt)
    normal_east, normal_north = place.turn(0, 1)
    target_lat, target_lon = place.to_degrees(target[0], target[1])
    camera_lat, camera_lon = place.to_degrees(camera[0], camera[1])
    return {
        "target_lat": round(target_lat, 8),
        "target_lon": round(target_lon, 8),
        "target_height": round(place.altitude_m + target[2], 3),
        "normal_x": round(normal_east, 6),
        "normal_y": round(normal_north, 6),
        "normal_z": 0.0,
        "camera_lat": round(camera_lat, 8),
        "camera_lon": round(camera_lon, 8),
        "camera_height": round(place.altitude_m + camera[2], 3),
        "distance": round(math.sqrt(ds**2 + dt**2 + dz**2), 3),
        "heading": round(math.degrees(math.atan2(east, north)) % 360, 4) % 360,
        "pitch": round(math.degrees(math.atan2(dz, math.hypot(ds, dt))), 4),
        "roll": 0.0,
    }


# ------------------------------------------------------------------------------------------------------ damage

BLANK_COLOUR = (128, 128, 128)


def without_numbers(row: dict, missing: int) -> bytes:
    """A `d` line that ends early."""
    return b" ".join(label_of(row | {"aligned": False}).split()[:-missing]) + b"\n"


BAD_LABELS: list[tuple[str, Callable[[dict], bytes]]] = [
    ("label_empty", lambda row: b""),
    ("label_empty", lambda row: b" \n\t\r\n"),
    ("label_malformed", lambda row: without_numbers(row, 2)),
    ("label_malformed", lambda row: label_of(row, lambda number: "unknown")),
    ("label_malformed", lambda row: row["alignment"].encode()),  # no `d` line
    ("label_malformed", lambda row: np.random.default_rng(row["patch_id"]).bytes(300)),
    ("not_finite", lambda row: label_of(row | {"target_lat": math.nan})),
    ("not_finite", lambda row: label_of(row | {"camera_height": math.inf})),
    ("position_out_of_range", lambda row: label_of(row | {"target_lat": 95.0})),
    ("position_out_of_range", lambda row: label_of(row | {"camera_lon": 200.0})),
    ("angle_out_of_range", lambda row: label_of(row | {"heading": 400.0})),
    ("angle_out_of_range", lambda row: label_of(row | {"pitch": 120.0})),
    ("distance_out_of_range", lambda row: label_of(row | {"distance": -5.0})),
    ("distance_out_of_range", lambda row: label_of(row | {"distance": 0.0})),
    ("distance_out_of_range", lambda row: label_of(row | {"distance": 20_000.0})),
    ("dataset_mismatch", lambda row: label_of(row | {"dataset_id": row["dataset_id"] + 500})),
]
BAD_IMAGES: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("jpeg_corrupt", lambda jpeg: jpeg[: len(jpeg) // 2]),
    ("jpeg_corrupt", lambda jpeg: jpeg[: len(jpeg) // 2] + b"\xff\xd9"),  # an end marker after half of the data
    ("jpeg_corrupt", lambda jpeg: jpeg[: len(jpeg) // 2] + bytes(len(jpeg) // 3) + jpeg[-len(jpeg) // 6 :]),
    ("jpeg_corrupt", lambda jpeg: b"<html><body>404 Not Found</body></html>\n"),
    ("jpeg_corrupt", lambda jpeg: b""),
    ("jpeg_blank", lambda jpeg: jpeg_of(Image.new("RGB", Image.open(io.BytesIO(jpeg)).size, BLANK_COLOUR), 90)),
]
OTHER_DAMAGE = (
    "both",
    "label_missing",
    "image_missing",
    "name_dataset",
    "name_words",
    "name_short",
    "duplicate_id",
)


def spoil(pair: Pair, damage: int | str) -> None:
    """Makes one of the damages to a pair: a number counts through BAD_LABELS, then BAD_IMAGES."""
    if isinstance(damage, int) and damage < len(BAD_LABELS):
        pair.label_reason, make_label = BAD_LABELS[damage]
        pair.label, pair.image_reason = make_label(pair.row), "partner_rejected"
    elif isinstance(damage, int):
        pair.image_reason, make_image = BAD_IMAGES[damage - len(BAD_LABELS)]
        pair.image, pair.label_reason = make_image(pair.image), "partner_rejected"
    elif damage == "both":
        pair.label, pair.label_reason = b"", "label_empty"
        pair.image, pair.image_reason = pair.image[:100], "jpeg_corrupt"
    elif damage == "label_missing":
        pair.label, pair.image_reason = None, "label_missing"
    elif damage == "image_missing":
        pair.image, pair.label_reason = None, "image_missing"
    elif damage == "name_dataset":
        pair.stem = name_of(pair.row | {"dataset_id": pair.row["dataset_id"] + 500})
        pair.label_reason, pair.image_reason = "dataset_mismatch", "partner_rejected"
    elif damage in ("name_words", "name_short"):
        pair.stem = "cover" if damage == "name_words" else pair.stem.rsplit("_", 1)[0]
        pair.label_reason = pair.image_reason = "name_malformed"
    elif damage == "duplicate_id":
        pair.label_reason, pair.image_reason = "partner_rejected", "duplicate_id"
    elif damage == "tar_truncated":
        pair.label_reason, pair.image_reason = "partner_rejected", "tar_truncated"


def make_odd(pair: Pair, oddity: int) -> None:
    """Changes a good pair into one that is unusual and valid; the image stays as it is."""
    if oddity == 0:
        pair.label = label_of(pair.row, lambda number: f"{number:.16e}")
    elif oddity == 1:
        pair.label = label_of(pair.row, blank=" \t ", end=" \r\n")
    elif oddity == 2:
        pair.suffix = ".jpeg"
    elif oddity == 3:  # ids in the name that are not the label's
        pair.stem = name_of(pair.row | {"patch_id": pair.row["patch_id"] + 5_000_000, "target_id": 7})


@lru_cache(maxsize=4)
def no_imagery(image_px: int) -> bytes:
    """The grey picture that a server sends where it has none: a crossed-out camera."""
    image = Image.new("RGB", (120, 120), (228, 227, 223))
    pen = ImageDraw.Draw(image)
    pen.rounded_rectangle([30, 42, 90, 82], radius=6, fill=(190, 190, 190))
    pen.ellipse([46, 48, 74, 76], fill=(228, 227, 223))
    pen.line([25, 90, 95, 32], fill=(150, 150, 150), width=4)
    return jpeg_of(image.resize((image_px, image_px)), 85)


def extra_pair(source: Pair, number: int, **changes: object) -> Pair:
    """A copy of a pair with an unused patch id."""
    patch_id = source.row["street"] * STREET_PATCHES + STREET_PATCHES // 2 + number
    row = source.row | {"patch_id": patch_id} | changes
    return Pair(row, source.image, label_of(row), name_of(row))


def damaged(pairs: list[Pair], damages: list[int | str], image_px: int, rng: np.random.Generator) -> list[Pair]:
    """A street's pairs, shuffled, some odd, and extra ones: near duplicates, no imagery, and every damage."""
    good = [replace(pairs[n]) for n in rng.permutation(len(pairs))]
    for n, pair in enumerate(good):
        make_odd(pair, n % 8)
    again = extra_pair(pairs[1], 0, kind="near_duplicate")
    again.image = jpeg_of(Image.open(io.BytesIO(again.image)), 88)
    absent = [extra_pair(pairs[n], 1 - n, kind="no_imagery") for n in (0, -1)]  # both ends of the street
    for pair in absent:
        pair.image = no_imagery(image_px)
    bad = []
    for n, damage in enumerate(damages):
        source = pairs[int(rng.integers(len(pairs)))]
        changes = {"patch_id": source.row["patch_id"], "street_view_id": source.row["street_view_id"] + 500}
        pair = extra_pair(source, 3 + n, **(changes if damage == "duplicate_id" else {}))
        spoil(pair, damage)
        bad.append(pair)
    return [*good, again, *absent, *bad]


# -------------------------------------------------------------------------------------------------------- tars


@dataclass(frozen=True)
class Member:
    """A regular file of a tar."""

    name: str
    content: bytes
    role: str  # images, labels or other: its counter in Truth.members unless it is rejected
    reason: str = ""
    row: dict | None = None  # of a valid image


def members_of(pairs: list[Pair], folder: str, other_folder: str, rng: np.random.Generator) -> list[Member]:
    """The pairs' files: images and labels in either order, the labels of some much later; bad ones elsewhere."""
    members, late, last = [], [], []
    repeated = {pair.row["patch_id"] for pair in pairs if pair.image_reason == "duplicate_id"}
    for pair in pairs:
        good = not (pair.image_reason or pair.label_reason)
        path = (folder if good else other_folder) + pair.stem
        row = pair.row if good else None
        files = [Member(path + ".txt", pair.label, "labels", pair.label_reason)]
        files.append(Member(path + pair.suffix, pair.image, "images", pair.image_reason, row))
        files = [file for file in files if file.content is not None]
        order = rng.random()
        if pair.image_reason == "tar_truncated":  # the image is cut: nothing may come after it
            last = files
        elif order < 0.1 and good and pair.row["patch_id"] not in repeated:  # there the first pair must stay first
            late.append(files.pop(0))
            members += files
        else:
            members += files[::-1] if order < 0.5 else files
    return late[::2] + members + late[1::2] + last


def street_members(settings: Settings, city: int, number: int, damages: list[int | str]) -> list[Member]:
    """A street's files in the order of the tar."""
    pairs = street_pairs(settings, city, number)
    rng = np.random.default_rng([settings.seed, city, number, 1])
    stem = f"{FIRST_DATASET + city:04d}"
    folders = [f"{stem}/{stem}/", ""] if city % 2 == 0 else ["", f"{stem}/{stem}/"]
    if not settings.damage:
        return members_of(pairs, *folders, rng)
    members = members_of(damaged(pairs, damages, settings.image_px, rng), *folders, rng)
    if number == 0:
        other = [("README", b"Street views, for tests.\n"), ("index.csv", b"patch,target\n1,2\n")]
        members[:0] = [Member(folders[0] + name, content, "other") for name, content in other]
    return members


def tar_info(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    """A header that is the same on every machine and day."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.mode, info.mtime = (
        size,
        kind,
        0o755 if kind == tarfile.DIRTYPE else 0o644,
        1_400_000_000,
    )
    return info


def write_tar(path: Path, members: Iterator[Member]) -> tuple[list[dict], list[dict], dict[str, int]]:
    """Writes a tar, which appears when whole; returns its rows of Truth.images and .rejects, and its counts."""
    images, rejects, counts = [], [], {"images": 0, "labels": 0, "rejects": 0, "other": 0}
    partial, cut_at, folders = path.with_name(f".{path.name}.partial"), None, set()
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member in members:
            for folder in reversed(Path(member.name).parents[:-1]):
                if folder not in folders:
                    tar.addfile(tar_info(folder.as_posix(), 0, tarfile.DIRTYPE))
                    folders.add(folder)
            if member.reason == "tar_truncated":
                cut_at = tar.offset + tarfile.BLOCKSIZE + len(member.content) // 2
            tar.addfile(tar_info(member.name, len(member.content)), io.BytesIO(member.content))
            counts["rejects" if member.reason else member.role] += 1
            if member.reason:
                rejects.append({"tar": path.name, "member": member.name, "reason": member.reason})
            elif member.row:
                row = member.row | {"tar": path.name, "member": member.name}
                images.append({name: row[name] for name in COLUMNS})
    if cut_at is not None:
        os.truncate(partial, cut_at)
    os.replace(partial, path)
    return images, rejects, counts


def write_dataset(out: Path, *, streets: int, cities: int = 2, seed: int = 0, damage: bool = False,
                  image_px: int = 640, targets_per_facade: tuple[int, int] = (1, 3), facades_per_street: int = 10,
                  views: tuple[int, int] = (2, 7), processes: int = 1) -> Truth:  # fmt: skip
    """Writes a tar per city into `out`, `streets` being their sum over the cities.

    Ranges include both ends. A target that fewer panoramas see than are drawn for it gets those that there are.
    """
    if streets < cities:
        raise ValueError(f"{cities} cities need at least as many streets, not {streets}")
    settings = Settings(seed, damage, image_px, targets_per_facade, facades_per_street, views)
    jobs = {(street % cities, street // cities): [] for street in range(streets)}
    places = list(jobs)
    if damage:
        for n, kind in enumerate([*range(len(BAD_LABELS) + len(BAD_IMAGES)), *OTHER_DAMAGE]):
            jobs[places[n % streets]].append(kind)
        jobs[max(places)].append("tar_truncated")
    tasks = [(settings, *place, jobs[place]) for place in sorted(jobs)]

    out.mkdir(parents=True, exist_ok=True)
    images, rejects, counts, started = [], [], {}, time.perf_counter()
    pool = multiprocessing.get_context("spawn").Pool(processes) if processes > 1 else None
    try:
        results = pool.imap(_street_members, tasks) if pool else map(_street_members, tasks)
        for city, streets_of_city in groupby(zip(tasks, results, strict=True), key=lambda pair: pair[0][1]):
            path = out / f"{FIRST_DATASET + city:04d}.tar"
            found = write_tar(path, (member for _, members in streets_of_city for member in members))
            images += found[0]
            rejects += found[1]
            counts[path.stem] = found[2]
            LOG.info("%s: %s images so far, %.1f s", path, f"{len(images):,}", time.perf_counter() - started)
    finally:
        if pool:
            pool.terminate()
    return Truth(
        pd.DataFrame(images, columns=COLUMNS), pd.DataFrame(rejects, columns=["tar", "member", "reason"]), counts
    )


def _street_members(task: tuple) -> list[Member]:
    return street_members(*task)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the tars")
    parser.add_argument("--streets", type=int, default=80, help="sum over all cities (default 80)")
    parser.add_argument("--cities", type=int, default=4, help="number of tars (default 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--damage", action="store_true", help="add bad and odd files of every kind")
    parser.add_argument("--image-px", type=int, default=640, help="width and height (default 640)")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--truth", type=Path, help="folder for what was planted (two Parquet files and a JSON)")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    started = time.perf_counter()
    truth = write_dataset(args.out, streets=args.streets, cities=args.cities, seed=args.seed, damage=args.damage,
                          image_px=args.image_px, processes=args.processes)  # fmt: skip
    if args.truth:
        truth.save(args.truth)
    seconds = time.perf_counter() - started
    buildings = truth.images.groupby(["dataset_id", "target_id"]).ngroups
    total = f"{len(truth.images):,} images of {buildings:,} buildings, {len(truth.rejects):,} rejects"
    rate = len(truth.images) / seconds
    LOG.info("%s: %d tars, %s; %.0f s, %.0f images/s", args.out, len(truth.members), total, seconds, rate)
    return 0


if __name__ == "__main__":
    sys.exit(main())
