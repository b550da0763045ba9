"""Drawing and geometry of synthetic street views; synthetic.py writes them into tars.

A street is drawn once as a strip of facades, 24 pixels to the metre. A view is that strip under the homography of
a pinhole camera that looks at a target on a facade, with its own light, season, trees and cars.
"""

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

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
