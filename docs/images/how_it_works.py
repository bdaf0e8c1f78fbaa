"""Draw how_it_works.svg: moments -> coefficients -> one affine.

python docs/images/how_it_works.py
"""

from pathlib import Path

import matplotlib

matplotlib.use('svg')
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

LARGE, SMALL, STATE = '#cfe2f3', '#fce5cd', '#e6e6e6'


def box(ax, x, y, width, height, title, text='', color='white'):
    ax.add_patch(
        FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle='round,pad=0,rounding_size=0.08',
            facecolor=color,
            edgecolor='#444444',
        )
    )
    middle = x + width / 2
    top = y + height - 0.3
    ax.text(middle, top, title, ha='center', va='center', weight='bold')
    ax.text(middle, top - 0.28, text, ha='center', va='top', linespacing=1.5)


def arrow(ax, start, end, text='', offset=(0, 0.18), bend=0.0, style='-'):
    ax.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle='-|>',
            mutation_scale=14,
            color='#444444',
            linestyle=style,
            connectionstyle=f'arc3,rad={bend}',
        )
    )
    x = (start[0] + end[0]) / 2 + offset[0]
    y = (start[1] + end[1]) / 2 + offset[1]
    ax.text(x, y, text, ha='center', va='center', style='italic')


def main():
    plt.rcParams.update(
        {
            'font.size': 10,
            'svg.hashsalt': 'wsbcn_mm',  # the same file every time
            'mathtext.fontset': 'dejavusans',
        }
    )
    figure, ax = plt.subplots(figsize=(10.4, 4.6))
    ax.set(xlim=(0, 13), ylim=(0.6, 6.1))
    ax.axis('off')

    box(ax, 0.1, 3.3, 2.0, 1.7, 'Input x', '(N, C, H, W)\nlarge', LARGE)
    box(
        ax,
        3.3,
        3.3,
        2.2,
        1.7,
        'Moments',
        'mean $m_{nc}$\nvariance $v_{nc}$\n(N, C): small',
        SMALL,
    )
    box(
        ax,
        6.5,
        3.3,
        2.5,
        1.7,
        'Coefficients',
        'scale $s_{nc}$, shift $t_{nc}$\n(N, C): small',
        SMALL,
    )
    box(
        ax,
        10.4,
        3.3,
        2.5,
        1.7,
        'Output y',
        '$s_{nc}\\,(x - m_{nc}) + t_{nc}$\nlarge',
        LARGE,
    )
    arrow(ax, (2.1, 4.15), (3.3, 4.15), 'pass 1')
    arrow(ax, (5.5, 4.15), (6.5, 4.15))
    arrow(ax, (9.0, 4.15), (10.4, 4.15), 'pass 2')
    arrow(ax, (1.1, 5.0), (11.6, 5.0), 'x, read again', (0, 1.0), -0.16, '--')
    ax.text(
        7.75,
        2.98,
        'one function of the small tensors for each normalization:',
        ha='center',
        va='center',
        weight='bold',
    )
    rows = [
        ('BN', 'moments averaged over the batch'),
        ('GN', 'moments averaged over a channel group of one image'),
        ('BCN', 'BN with the estimates, then GN of the result'),
        ('MABN', 'mean squares averaged over the last batches'),
    ]
    for number, (name, text) in enumerate(rows):
        y = 2.55 - 0.42 * number
        ax.text(5.7, y, name, ha='left', va='center', weight='bold')
        ax.text(6.6, y, text, ha='left', va='center')
    box(
        ax,
        0.9,
        0.95,
        3.6,
        1.4,
        'Estimates $\\mu_c, \\sigma^2_c$',
        'moved by the update rate r\nin each training forward',
        STATE,
    )
    arrow(ax, (3.9, 3.3), (3.3, 2.35))
    arrow(ax, (4.5, 1.72), (5.6, 1.72))
    figure.savefig(
        Path(__file__).with_suffix('.svg'),
        bbox_inches='tight',
        metadata={'Date': None},
    )


if __name__ == '__main__':
    main()
