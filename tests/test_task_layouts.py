"""Data sets are read as they are published, and what is wrong with one is said in a line that names it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from dla_fast.tasks.errors import DataError
from dla_fast.tasks.layouts import classes, edges, labels

ROOT = Path(__file__).resolve().parents[1]
PARTS = {"cub200": "birds", "cars": "cars", "aircraft": "aircraft", "food101": "food-101", "dogs": "dogs"}
PUBLISHED = {
    "cub200": "CUB_200_2011",
    "cars": "stanford_cars",
    "aircraft": "fgvc-aircraft-2013b",
    "food101": "food-101",
}


@pytest.fixture(scope="module")
def made(maker, tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    for part in PARTS.values():
        maker.PARTS[part](root / part, 0, train=2, test=1)
    maker.scenes(root / "scenes", 0, train=2, val=1)
    maker.camvid(root / "camvid", 0, train=2, val=1)
    maker.boundaries(root / "boundaries", 0, train=2, val=1, test=1)
    maker.voc(root / "voc", 0, train=2, val=1)
    return root


@pytest.fixture
def copied(made, tmp_path):
    """Gives a part of the made data that a test may damage."""
    return lambda part: Path(shutil.copytree(made / part, tmp_path / part))


def png(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path)
    return path


def replaced(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# --- classes


@pytest.mark.parametrize(
    ("layout", "split", "expected"),
    [
        ("cub200", "train", {"images/003.China/China_0001_7.jpg": "003.China"}),
        ("cub200", "test", {"images/003.China/China_0003_9.jpg": "003.China"}),
        ("cars", "train", {"cars_train/00001.jpg": "Astronaut Sedan 2012", "cars_train/00006.jpg": "China Sedan 2012"}),
        ("cars", "test", {"cars_test/00002.jpg": "Chelsea Sedan 2012"}),
        ("aircraft", "train", {"data/images/0030001.jpg": "hubble_deep_field 300"}),
        ("aircraft", "test", {"data/images/0020003.jpg": "flower 200"}),
        ("food101", "train", {"images/flower/2001.jpg": "flower"}),
        ("food101", "test", {"images/coffee/1003.jpg": "coffee"}),
        ("dogs", "train", {"Images/n00000002-Immunohistochemistry/n00000002_1.jpg": "Immunohistochemistry"}),
        ("dogs", "test", {"Images/n00000003-Retina/n00000003_3.jpg": "Retina"}),
    ],
)
def test_published_lists(made, layout, split, expected):
    root = made / PARTS[layout]
    read = classes.LAYOUTS[layout](root, split)
    count = 8 if layout == "cub200" else 3
    assert len(read.classes) == count
    assert [label for _, label in read.samples] == [
        i for i in range(count) for _ in range(2 if split == "train" else 1)
    ]
    names = {path.relative_to(root).as_posix(): read.classes[label] for path, label in read.samples}
    assert names.items() >= expected.items()
    assert all(path.is_file() for path, _ in read.samples)


@pytest.mark.parametrize("layout", PARTS)
def test_val_is_the_test_part_and_no_image_is_in_both(made, layout):
    read = {split: classes.LAYOUTS[layout](made / PARTS[layout], split) for split in ("train", "val", "test")}
    assert read["val"] == read["test"]
    assert not {path for path, _ in read["train"].samples} & {path for path, _ in read["test"].samples}
    assert read["train"].classes == read["test"].classes


@pytest.mark.parametrize("layout", PUBLISHED)
def test_the_folder_may_be_that_above(made, tmp_path, layout):
    shutil.copytree(made / PARTS[layout], tmp_path / PUBLISHED[layout])
    assert len(classes.LAYOUTS[layout](tmp_path, "train").samples) == (16 if layout == "cub200" else 6)


def test_lists_where_else_they_are_published(copied):
    dogs, cars = copied("dogs"), copied("cars")
    expected = {root: classes.LAYOUTS[root.name](root, "test") for root in (dogs, cars)}
    (dogs / "lists").mkdir()
    for name in ("train_list.mat", "test_list.mat"):
        (dogs / name).rename(dogs / "lists" / name)
    name = "cars_test_annos_withlabels.mat"
    (cars / name).rename(cars / "devkit" / name)
    for root, before in expected.items():
        assert classes.LAYOUTS[root.name](root, "test") == before


def test_train_of_aircraft_is_trainval(made):
    root = made / "aircraft"
    listed = {split: (root / f"data/images_variant_{split}.txt").read_text().splitlines() for split in ("train", "val")}
    assert listed["train"]
    assert listed["val"]
    names = {path.stem for path, _ in classes.LAYOUTS["aircraft"](root, "train").samples}
    assert names == {line.split()[0] for lines in listed.values() for line in lines}


def test_image_folder(tmp_path):
    for name in ("train/b/2.png", "train/b/deep/er/1.PNG", "train/a/x.jpg", "train/.hidden/y.png", "train/a/._x.jpg"):
        png(tmp_path / Path(name).with_suffix(".png"), np.zeros((2, 2))).rename(tmp_path / name)
    (tmp_path / "train/a/notes.txt").write_text("no image")
    png(tmp_path / "validation/c/1.png", np.zeros((2, 2)))
    read = classes.LAYOUTS["folder"]
    assert read(tmp_path, "train") == classes.Labelled(
        [
            (tmp_path / "train/a/x.jpg", 0),
            (tmp_path / "train/b/2.png", 1),
            (tmp_path / "train/b/deep/er/1.PNG", 1),
        ],
        ["a", "b"],
    )
    for split in ("val", "test"):
        assert read(tmp_path, split) == classes.Labelled([(tmp_path / "validation/c/1.png", 0)], ["c"])
    png(tmp_path / "test/t/1.png", np.zeros((2, 2)))
    assert read(tmp_path, "test").classes == ["t"]
    assert read(tmp_path, "val").classes == ["c"]


def test_image_folder_without_images(tmp_path):
    read = classes.LAYOUTS["folder"]
    with pytest.raises(DataError, match="nowhere: there is no such folder"):
        read(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match="needs a folder val or validation or test there"):
        read(tmp_path, "val")
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="train: the layout folder needs a folder for each class"):
        read(tmp_path, "train")
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(DataError, match="empty: there is no image"):
        read(tmp_path, "train")


@pytest.mark.parametrize("layout", PARTS)
def test_a_root_that_is_none(tmp_path, layout):
    with pytest.raises(DataError, match="nowhere: there is no such folder"):
        classes.LAYOUTS[layout](tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match=f"{tmp_path}: the layout {layout} needs"):
        classes.LAYOUTS[layout](tmp_path, "train")


@pytest.mark.parametrize(
    ("layout", "image"),
    [
        ("cub200", "images/001.Astronaut/Astronaut_0001_1.jpg"),
        ("cars", "cars_train/00001.jpg"),
        ("aircraft", "data/images/0010001.jpg"),
        ("food101", "images/coffee/1001.jpg"),
        ("dogs", "Images/n00000001-Hubble_Deep_Field/n00000001_1.jpg"),
    ],
)
def test_absent_images_are_named_and_counted(copied, layout, image):
    root = copied(PARTS[layout])
    (root / image).unlink()
    of = 16 if layout == "cub200" else 6
    with pytest.raises(DataError, match=rf"{image}: there is no such file, and .* names it \(1 of {of} absent\)"):
        classes.LAYOUTS[layout](root, "train")
    assert classes.LAYOUTS[layout](root, "test").samples
    shutil.rmtree((root / image).parent)
    with pytest.raises(DataError, match=r"needs a folder|\([26] of"):
        classes.LAYOUTS[layout](root, "train")


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("cub200", "image_class_labels.txt"),
        ("cub200", "train_test_split.txt"),
        ("cub200", "classes.txt"),
        ("cars", "devkit/cars_meta.mat"),
        ("cars", "devkit/cars_train_annos.mat"),
        ("aircraft", "data/images_variant_trainval.txt"),
        ("food101", "meta/train.txt"),
        ("dogs", "train_list.mat"),
        ("dogs", "test_list.mat"),
    ],
)
def test_lists_that_are_absent_or_broken(copied, layout, name):
    path = copied(PARTS[layout]) / name
    root, content = path.parents[name.count("/")], path.read_bytes()
    path.unlink()
    with pytest.raises(DataError, match=f"{Path(name).name}: there is no such file, and the layout {layout} needs it"):
        classes.LAYOUTS[layout](root, "train")
    path.write_bytes(content[: len(content) // 2] if path.suffix == ".mat" else b"\xff\xfe\x00")
    with pytest.raises(DataError, match=f"{path.name}: (no readable MATLAB file|it cannot be read)"):
        classes.LAYOUTS[layout](root, "train")


@pytest.mark.parametrize(
    ("layout", "name", "old", "new", "message"),
    [
        ("cub200", "image_class_labels.txt", "1 1\n", "1 9\n", r"label of Astronaut_0001_1.jpg is 9, and there are 8"),
        ("cub200", "image_class_labels.txt", "1 1\n", "1 0\n", r"label of Astronaut_0001_1.jpg is 0, and there are 8"),
        ("cub200", "image_class_labels.txt", "1 1\n", "1 one\n", r"labels.txt, image 1: 'one' is no number"),
        ("cub200", "image_class_labels.txt", "1 1\n", "", r"labels.txt: it says nothing of image 1 \(001.Astr"),
        ("cub200", "classes.txt", "3 003.China\n", "3\n", r"classes.txt: class 3 has no name"),
        ("cub200", "classes.txt", "3 003.China\n", "", r"classes.txt: class 3 has no name"),
        ("cub200", "classes.txt", "3 003.China\n", "3 004.Coffee\n", r"several classes are called 004.Coffee"),
        ("aircraft", "data/images_variant_trainval.txt", "coffee 100", "tea", r"entry 1, 0010001.jpg, is of 'tea'"),
        ("food101", "meta/train.txt", "flower/2001", "tea/2001", r"entry 3, 2001.jpg, is of 'tea', which is none"),
    ],
)
def test_lists_with_something_wrong(copied, layout, name, old, new, message):
    root = copied(PARTS[layout])
    replaced(root / name, old, new)
    with pytest.raises(DataError, match=message):
        classes.LAYOUTS[layout](root, "train")


def test_splits_without_an_image(copied):
    food, birds = copied("food-101"), copied("birds")
    (food / "meta/test.txt").write_text("\n")
    with pytest.raises(DataError, match=r"test.txt: it names no image"):
        classes.LAYOUTS["food101"](food, "test")
    path = birds / "train_test_split.txt"
    path.write_text(path.read_text().replace(" 0\n", " 1\n"))
    with pytest.raises(DataError, match="it names no image"):
        classes.LAYOUTS["cub200"](birds, "test")


def cell(*texts):
    found = np.empty((len(texts), 1), object)
    found[:, 0] = texts
    return found


def test_matlab_lists_with_something_wrong(copied):
    cars, dogs = copied("cars"), copied("dogs")
    meta = cars / "devkit/cars_meta.mat"
    savemat(meta, {"class_names": cell("a", "b").T})
    with pytest.raises(DataError, match=r"cars_train_annos.mat: the label of 00005.jpg is 3, and there are 2 classes"):
        classes.LAYOUTS["cars"](cars, "train")
    savemat(meta, {"class_names": cell("a", "", "c").T})
    with pytest.raises(DataError, match="class 2 of 3 has no name"):
        classes.LAYOUTS["cars"](cars, "train")
    savemat(meta, {"names": cell("a")})
    with pytest.raises(DataError, match=r"cars_meta.mat: no variable class_names in it"):
        classes.LAYOUTS["cars"](cars, "train")

    first, second = (f"n0000000{i}-{n}/x.jpg" for i, n in ((1, "Hubble_Deep_Field"), (2, "Immunohistochemistry")))
    for values, message in (
        ([1, 1], "the label of n00000002-Immunohistochemistry/x.jpg is 1, and that of Hubble_Deep_Field as well"),
        ([1, 0], "a label is 0, and they start with 1"),
        ([1], "2 images, and 1 labels"),
    ):
        savemat(dogs / "train_list.mat", {"file_list": cell(first, second), "labels": np.array([values]).T})
        with pytest.raises(DataError, match=message):
            classes.LAYOUTS["dogs"](dogs, "train")


def test_annotations_of_cars_without_labels(copied):
    cars = copied("cars")
    fields = np.empty((1, 2), [("fname", object)])
    fields["fname"] = "00001.jpg"
    savemat(cars / "cars_test_annos_withlabels.mat", {"annotations": fields})
    with pytest.raises(DataError, match=r"withlabels.mat: annotation 1 has no fname or no class"):
        classes.LAYOUTS["cars"](cars, "test")


# --- labels


def test_cityscapes_as_made(made, maker):
    data = labels.LAYOUTS["cityscapes"](made / "scenes")
    assert len(data.classes) == 19
    assert data.palette.shape == (19, 3)
    names = {7: "road", 8: "sidewalk", 11: "building", 21: "vegetation", 23: "sky", 24: "person", 26: "car"}
    pairs = data.pairs("train")
    assert [image.name for image, _ in pairs] == [f"drawn_{i:06d}_000019_leftImg8bit.png" for i in range(2)]
    for (image, annotation), (_, _, drawn, ids) in zip(pairs, maker._streets(0, 2, 0), strict=True):
        read = data.labels(annotation)
        assert read.dtype == np.uint8
        for number in np.unique(ids):
            expected = data.classes.index(names[number]) if number in names else 255
            assert (read[ids == number] == expected).all()
        assert (np.asarray(Image.open(image)) == drawn).all()


def test_ids_of_cityscapes(tmp_path):
    (tmp_path / "leftImg8bit").mkdir()
    data = labels.LAYOUTS["cityscapes"](tmp_path)
    read = data.labels(png(tmp_path / "a_gtFine_labelIds.png", np.arange(34)[None]))[0]
    classes_of = {
        7: 0,
        8: 1,
        11: 2,
        12: 3,
        13: 4,
        17: 5,
        19: 6,
        20: 7,
        21: 8,
        22: 9,
        23: 10,
        24: 11,
        25: 12,
        26: 13,
        27: 14,
    }
    classes_of |= {28: 15, 31: 16, 32: 17, 33: 18}
    assert read.tolist() == [classes_of.get(i, 255) for i in range(34)]
    assert data.classes[7] == "traffic sign"
    assert data.palette[13].tolist() == [0, 0, 142]
    with pytest.raises(DataError, match=r"b_gtFine_labelIds.png: values 34, 255 in it are none of the 19 classes"):
        data.labels(png(tmp_path / "b_gtFine_labelIds.png", [[7, 255, 34, 7]]))
    train_ids = png(tmp_path / "c_gtFine_labelTrainIds.png", [[0, 18, 255]])
    assert data.labels(train_ids).tolist() == [[0, 18, 255]]
    with pytest.raises(DataError, match="values 19 in it"):
        data.labels(png(tmp_path / "d_gtFine_labelTrainIds.png", [[0, 19]]))
    with pytest.raises(DataError, match=r"e_gtFine_labelIds.png: 3 channels"):
        data.labels(png(tmp_path / "e_gtFine_labelIds.png", np.zeros((2, 2, 3))))


def test_files_of_cityscapes(copied):
    root = copied("scenes")
    data = labels.LAYOUTS["cityscapes"](root)
    with pytest.raises(DataError, match="needs a folder test"):
        data.pairs("test")
    shutil.copytree(root / "leftImg8bit/val", root / "leftImg8bit/test")
    ((image, annotation),) = data.pairs("test")
    assert image.parent == root / "leftImg8bit/test/drawn"
    assert annotation is None
    ids = root / "gtFine/val/drawn/drawn_000000_000019_gtFine_labelIds.png"
    assert data.pairs("val")[0][1] == ids
    train_ids = png(Path(str(ids).replace("labelIds", "labelTrainIds")), [[0]])
    assert data.pairs("val")[0][1] == train_ids
    train_ids.unlink()
    ids.unlink()
    with pytest.raises(DataError, match=rf"{ids.name}: there is no such file, .*\(1 of 1 absent\)"):
        data.pairs("val")


def test_broken_annotations_are_named(copied):
    for layout, part in (("cityscapes", "scenes"), ("camvid", "camvid")):
        data = labels.LAYOUTS[layout](copied(part))
        _, annotation = data.pairs("train")[0]
        annotation.write_bytes(annotation.read_bytes()[:200])
        with pytest.raises(DataError, match=f"{annotation}: no readable image"):
            data.labels(annotation)
        annotation.unlink()
        with pytest.raises(DataError, match=f"{annotation}: there is no such file"):
            data.labels(annotation)


def test_camvid_as_made(made, maker):
    data = labels.LAYOUTS["camvid"](made / "camvid")
    assert len(data.classes) == len(data.palette) == 11
    names = {7: "road", 8: "pavement", 11: "building", 21: "tree", 23: "sky", 24: "pedestrian", 26: "car"}
    for split, count in (("train", 2), ("val", 1), ("test", 1)):
        pairs = data.pairs(split)
        assert len(pairs) == count
        drawn = [
            ids for where, _, _, ids in maker._streets(0, 2, 1) if where == ("train" if split == "train" else "val")
        ]
        for (_, annotation), ids in zip(pairs, drawn, strict=True):
            read = data.labels(annotation)
            for number in np.unique(ids):
                assert (read[ids == number] == (data.classes.index(names[number]) if number in names else 255)).all()


@pytest.fixture
def own(tmp_path):
    """A folder in the layout of CamVid, with an image."""
    png(tmp_path / "train/a.png", np.zeros((1, 4, 3)))
    (tmp_path / "trainannot").mkdir()
    return tmp_path


def test_camvid_without_lists(own):
    data = labels.LAYOUTS["camvid"](own)
    assert data.labels(png(own / "trainannot/a.png", [[0, 10, 11, 255]])).tolist() == [[0, 10, 255, 255]]
    with pytest.raises(DataError, match=r"a.png: values 12 in it are none of the 11 classes"):
        data.labels(png(own / "trainannot/a.png", [[0, 12]]))
    with pytest.raises(DataError, match=r"it has colours, and for these .*label_colors.txt was expected"):
        data.labels(png(own / "trainannot/a.png", np.zeros((1, 1, 3))))
    with pytest.raises(DataError, match="needs a folder train or val or test"):
        labels.LAYOUTS["camvid"](own / "trainannot")


def test_classes_of_ones_own(own):
    (own / "classes.txt").write_text("cat\ndog\n\nbig bird\n")
    data = labels.LAYOUTS["camvid"](own)
    assert data.classes == ["cat", "dog", "big bird"]
    assert data.palette.dtype == np.uint8
    assert len({tuple(colour) for colour in data.palette.tolist()}) == 3
    assert data.labels(png(own / "trainannot/a.png", [[0, 2, 255]])).tolist() == [[0, 2, 255]]
    with pytest.raises(DataError, match="values 3, 11 in it are none of the 3 classes"):
        data.labels(png(own / "trainannot/a.png", [[0, 11, 3]]))
    for text in ("", "cat\ncat\n", "".join(f"{i}\n" for i in range(255))):
        (own / "classes.txt").write_text(text)
        with pytest.raises(DataError, match="classes are listed there"):
            labels.LAYOUTS["camvid"](own)


def test_pixels_of_one_bit(own):
    Image.fromarray(np.array([[False, True, True]])).save(own / "trainannot/a.png")
    assert labels.LAYOUTS["camvid"](own).labels(own / "trainannot/a.png").tolist() == [[0, 1, 1]]


def test_a_palette_is_no_colour(own):
    picture = Image.fromarray(np.array([[0, 3, 11]], np.uint8))
    picture.putpalette(list(range(256)) * 3)
    picture.save(own / "trainannot/a.png")
    data = labels.LAYOUTS["camvid"](own)
    assert data.labels(data.pairs("train")[0][1]).tolist() == [[0, 3, 255]]


CAMVID = """64 128 64 Animal\n192 0 128 Archway\n0 128 192 Bicyclist\n0 128 64 Bridge\n128 0 0 Building\n64 0 128 Car
64 0 192 CartLuggagePram\n192 128 64 Child\n192 192 128 Column_Pole\n64 64 128 Fence\n128 0 192 LaneMkgsDriv
192 0 64 LaneMkgsNonDriv\n128 128 64 Misc_Text\n192 0 192 MotorcycleScooter\n128 64 64 OtherMoving
64 192 128 ParkingBlock\n64 64 0 Pedestrian\n128 64 128 Road\n128 128 192 RoadShoulder\n0 0 192 Sidewalk
192 128 128 SignSymbol\n128 128 128 Sky\n64 128 192 SUVPickupTruck\n0 0 64 TrafficCone\n0 64 64 TrafficLight
192 64 128 Train\n128 128 0 Tree\n192 128 192 Truck_Bus\n64 0 64 Tunnel\n192 192 0 VegetationMisc\n0 0 0 Void
64 192 0 Wall\n"""


def test_colours_of_the_original_camvid(own):
    (own / "label_colors.txt").write_text(CAMVID.replace(" ", "\t"))
    data = labels.LAYOUTS["camvid"](own)
    assert len(data.classes) == 11
    # Sky, lane markings, a truck, a child, void.
    colours = [[128, 128, 128], [128, 0, 192], [192, 128, 192], [192, 128, 64], [0, 0, 0]]
    png(own / "trainannot/a_L.png", [colours])
    ((_, annotation),) = data.pairs("train")
    assert annotation == own / "trainannot/a_L.png"
    assert data.labels(annotation).tolist() == [[0, 3, 8, 9, 255]]
    with pytest.raises(DataError, match=r"a_L.png: colours \[0, 0, 1\], \[1, 2, 3\] in it are none of the 32"):
        data.labels(png(annotation, [[[1, 2, 3], [0, 0, 1], [0, 0, 0]]]))
    assert {
        data.labels(png(annotation, [[[int(v) for v in line.split()[:3]] for line in CAMVID.splitlines()]])).tobytes()
    } == {bytes([9, 1, 10, 1, 1, 8, 9, 9, 2, 7, 3, 3, 6, 10, 8, 4, 9, 3, 4, 4, 6, 0, 8, 2, 6, 8, 5, 8, 1, 5, 255, 1])}


def test_colours_of_ones_own(own):
    path = own / "label_colors.txt"
    path.write_text("0 0 255 big bird\n0 0 0 void\n255 0 0 cat\n")
    data = labels.LAYOUTS["camvid"](own)
    assert data.classes == ["big bird", "cat"]
    assert data.palette.tolist() == [[0, 0, 255], [255, 0, 0]]
    annotation = own / "trainannot/a.png"
    assert data.labels(png(annotation, [[[255, 0, 0], [0, 0, 0], [0, 0, 255]]])).tolist() == [[1, 255, 0]]
    assert data.labels(png(annotation, [[[255, 0, 0, 9], [0, 0, 0, 255]]])).tolist() == [[1, 255]]
    assert data.labels(png(annotation, [[0, 1, 255]])).tolist() == [[0, 1, 255]]
    for line, message in (
        ("1 2 cat", "'1 2 cat', and R G B name was expected"),
        ("1 2 256 cat", "from 0 to 255"),
        ("1 2 x cat", "'x' is no number"),
        ("1 2 3 a\n1 2 4 a", "entry 2: .* was listed before"),
        ("1 2 3 a\n1 2 3 b", "entry 2: .* was listed before"),
    ):
        path.write_text(line)
        with pytest.raises(DataError, match=message):
            labels.LAYOUTS["camvid"](own)


def test_a_test_split_of_camvid_may_lack_annotations(copied):
    root = copied("camvid")
    shutil.rmtree(root / "testannot")
    shutil.rmtree(root / "valannot")
    data = labels.LAYOUTS["camvid"](root)
    assert data.pairs("test") == [(root / "test/drawn_00000.png", None)]
    with pytest.raises(DataError, match=r"valannot/drawn_00000.png: there is no such file.*\(1 of 1 absent\)"):
        data.pairs("val")


# --- edges


def test_bsds500_as_made(made, maker):
    data = edges.LAYOUTS["bsds500"](made / "boundaries")
    drawn = list(maker._shapes(0, (2, 1, 1)))
    read = [pair for split in ("train", "val", "test") for pair in data.pairs(split)]
    assert len(read) == 4
    for (image, annotation), (split, number, shapes) in zip(read, drawn, strict=True):
        assert image == made / f"boundaries/data/images/{split}/{number}.jpg"
        found = data.annotations(annotation)
        assert [each.dtype for each in found] == [bool] * 3
        for each, regions in zip(found, shapes.regions, strict=True):
            assert (each == maker.made_scenes.boundaries(regions)).all()


@pytest.mark.parametrize("above", ["", "data", "BSDS500/data"])
def test_roots_of_bsds500(made, tmp_path, above):
    shutil.copytree(made / "boundaries/data", tmp_path / "it" / above)
    assert len(edges.LAYOUTS["bsds500"](tmp_path / "it").pairs("train")) == 2


def test_one_annotator_and_broken_files_of_bsds500(copied):
    root = copied("boundaries")
    data = edges.LAYOUTS["bsds500"](root)
    _, path = data.pairs("train")[0]
    drawn = np.array([[0, 1, 0], [1, 0, 0]], np.uint8)

    def write(*cells):
        found = np.empty((1, len(cells)), object)
        found[0, :] = cells
        savemat(path, {"groundTruth": found})

    write({"Boundaries": drawn, "Segmentation": drawn})
    (read,) = data.annotations(path)
    assert read.tolist() == [[False, True, False], [True, False, False]]
    for cells in ((), ({"Segmentation": drawn},), ({"Boundaries": drawn}, {"Boundaries": drawn.T})):
        write(*cells)
        with pytest.raises(DataError, match=f"{path}: the cells of groundTruth need Boundaries"):
            data.annotations(path)
    savemat(path, {"other": drawn})
    with pytest.raises(DataError, match="no variable groundTruth in it"):
        data.annotations(path)
    path.write_bytes(b"no MATLAB file at all")
    with pytest.raises(DataError, match=f"{path}: no readable MATLAB file"):
        data.annotations(path)
    path.unlink()
    with pytest.raises(DataError, match=rf"{path}: there is no such file, .*\(1 of 2 absent\)"):
        data.pairs("train")
    shutil.rmtree(root / "data/groundTruth/test")
    assert [annotation for _, annotation in data.pairs("test")] == [None]
    with pytest.raises(DataError, match="needs images there, or in data or BSDS500/data"):
        edges.LAYOUTS["bsds500"](root / "data/images")


def test_pascal_as_made(made):
    for root in (made / "voc", made / "voc/VOCdevkit", made / "voc/VOCdevkit/VOC2012"):
        data = edges.LAYOUTS["pascal"](root)
        names = {
            split: [image.stem for image, _ in data.pairs(split)] for split in ("train", "val", "test", "trainval")
        }
        assert names["train"] == ["2012_001000", "2012_001001"]
        assert names["val"] == names["test"] == ["2012_002000"]
        assert names["trainval"] == names["train"] + names["val"]


def test_boundaries_of_instances(tmp_path):
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    data = edges.LAYOUTS["pascal"](tmp_path)
    instances = np.zeros((17, 24), np.uint8)
    instances[3:14, 4:12], instances[3:14, 12:20] = 1, 2  # two that touch
    (found,) = data.annotations(png(tmp_path / "a.png", instances))
    assert not found[instances == 0].any()
    assert found[3, 6:10].all()
    assert found[8].nonzero()[0].tolist() in ([4, 11, 19], [4, 12, 19])  # one line between them

    instances[2:15, 2:6] = 255  # a border on the left alone: half of it is the object's
    (found,) = data.annotations(png(tmp_path / "b.png", instances))
    assert found[8].nonzero()[0][0] == 4
    (found,) = data.annotations(png(tmp_path / "c.png", np.full((4, 5), 255)))
    assert found.shape == (4, 5)
    assert not found.any()
    with pytest.raises(DataError, match=r"d.png: 3 channels, and a PNG of indices"):
        data.annotations(png(tmp_path / "d.png", np.zeros((2, 2, 3))))


def test_files_of_pascal(copied):
    root = copied("voc") / "VOCdevkit/VOC2012"
    data = edges.LAYOUTS["pascal"](root)
    image, annotation = data.pairs("val")[0]
    annotation.write_bytes(annotation.read_bytes()[:100])
    with pytest.raises(DataError, match=f"{annotation}: no readable image"):
        data.annotations(annotation)
    for path in (annotation, image):
        path.unlink()
        with pytest.raises(
            DataError, match=rf"{path}: there is no such file, and .*val.txt names it \(1 of 1 absent\)"
        ):
            data.pairs("val")
    (root / "ImageSets/Segmentation/val.txt").write_text("")
    with pytest.raises(DataError, match=r"val.txt: it names no image"):
        data.pairs("val")
    with pytest.raises(DataError, match="needs ImageSets/Segmentation there"):
        edges.LAYOUTS["pascal"](root / "JPEGImages")
