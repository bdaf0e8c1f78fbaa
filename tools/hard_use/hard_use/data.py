"""Images that are missing or broken, and annotations that are wrong."""

import json
import shutil
from pathlib import Path

from .bench import Bench, attack, edit_annotations

GROUP = 'Data'
ANNOTATIONS = 'annotations/instances_train.json'


def train_on(bench: Bench, scenes: Path, text: str = ''):
    """One epoch, on other scenes."""
    other = Bench(bench.folder / f'on_{scenes.name}', scenes)
    config = other.config(f'train_cfg = dict(max_epochs=1)\n{text}')
    return other.train(config, other.folder / 'run')


@attack(GROUP, 'an image that is missing, or damaged', slow=True)
def images(bench: Bench) -> None:
    workers = 'train_dataloader.update(num_workers=1)\n'
    for what in ('missing', 'empty', 'truncated', 'text'):
        for text in ('', workers):
            scenes = bench.folder / f'{what}{"_workers" if text else ""}'
            shutil.copytree(bench.scenes, scenes)
            image = next((scenes / 'leftImg8bit/train').rglob('*.png'))
            content = image.read_bytes()
            if what == 'missing':
                image.unlink()
            elif what == 'empty':
                image.write_bytes(b'')
            elif what == 'truncated':
                image.write_bytes(content[: len(content) // 8])
            else:
                image.write_text('<html>404</html>')
            with bench.survives(f'{scenes.name} image'):
                run = train_on(bench, scenes, text)
                if what == 'truncated' and run.code == 0:
                    continue  # decoders take what there is of it
                told = 'num_workers=0' if what == 'empty' else image.name
                run.refuses(told if text else image.name, '--resume')


def empty_images(content: dict) -> None:
    content['annotations'] = [
        a
        for a in content['annotations']
        if a['image_id'] != content['images'][0]['id']
    ]


def degenerate_boxes(content: dict) -> None:
    for i, annotation in enumerate(content['annotations']):
        x, y, w, h = annotation['bbox']
        annotation['bbox'] = [
            [x, y, 0, 0],
            [x, y, -w, h],
            [-1000, -1000, w, h],
            [x, y, w, 0.5],
            [x, y, w, h],
        ][i % 5]


def one_box_of_nothing(content: dict) -> None:
    """Every image has boxes, and none of them is any good."""
    for annotation in content['annotations']:
        annotation['bbox'] = [1, 1, 0, 0]


def unknown_category(content: dict) -> None:
    for annotation in content['annotations'][::2]:
        annotation['category_id'] = 999


def other_names(content: dict) -> None:
    for category in content['categories']:
        category['name'] = f'digit {category["name"]}'


def a_class_less(content: dict) -> None:
    content['categories'] = content['categories'][1:]


def no_annotations(content: dict) -> None:
    content['annotations'] = []


def no_list_of_images(content: dict) -> None:
    del content['images']


def box_without_size(content: dict) -> None:
    del content['annotations'][0]['bbox']


def same_ids(content: dict) -> None:
    for annotation in content['annotations']:
        annotation['id'] = 1


@attack(GROUP, 'annotations that are empty, degenerate or wrong', slow=True)
def annotations(bench: Bench) -> None:
    for change in (
        empty_images,
        degenerate_boxes,
        one_box_of_nothing,
        unknown_category,
    ):
        with bench.survives(f'{change.__name__}: trains'):
            scenes = bench.folder / change.__name__
            edit_annotations(bench.scenes, scenes, change)
            keep = 'filter_cfg=dict(filter_empty_gt=False)'
            text = f"train_dataloader['dataset'].update({keep})\n"
            run = train_on(bench, scenes, text)
            run.succeeds()
            assert 'loss: nan' not in run.output, 'the loss is NaN'
    with bench.survives('a_class_less: trains, and the log says what is lost'):
        scenes = bench.folder / 'a_class_less'
        edit_annotations(bench.scenes, scenes, a_class_less)
        train_on(bench, scenes).succeeds().says("has no '0'", times=1)
    for change, part in (
        (other_names, 'digit 0.*metainfo=dict\\(classes'),
        (no_annotations, 'no image is left'),
        (no_list_of_images, 'images'),
        (box_without_size, 'bbox'),
        (same_ids, 'not unique'),
    ):
        with bench.survives(f'{change.__name__}: refused'):
            scenes = bench.folder / change.__name__
            edit_annotations(bench.scenes, scenes, change)
            train_on(bench, scenes).refuses('instances_train.json', part)
    for what, content in (('truncated', '{"images": [{'), ('empty', '')):
        with bench.survives(f'an annotation file that is {what}: refused'):
            scenes = bench.folder / f'{what}_file'
            shutil.copytree(bench.scenes, scenes)
            (scenes / ANNOTATIONS).write_text(content)
            train_on(bench, scenes).refuses('instances_train.json', 'JSON')
    with bench.survives('a list in place of the annotation file: refused'):
        scenes = bench.folder / 'list_file'
        shutil.copytree(bench.scenes, scenes)
        (scenes / ANNOTATIONS).write_text(json.dumps([1, 2]))
        train_on(bench, scenes).refuses('instances_train.json')
