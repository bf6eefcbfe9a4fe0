"""A planar robot that has to remember (`Cue`), to see (`Pixels`) or to explore (`Maze`).

Robot: a body of 1 kg on a plane with drag; it cannot enter walls and slides along them. x points east and y south [m],
as the maps below are written, one character per square metre, '#' a wall, the origin in the corner at the north-west.
State: position (2) [m], velocity (2) [m/s]; at most FORCE / DRAG = 2 m/s along each axis.
Actions (2): force along x and y, 1.0 = 4 N; clipped to [-1, 1]. One step is 0.1 s.

Cue, for ppo_rnn.py: one of four cues is shown for 4 steps, during which the actions do nothing; then drive to that
landmark. When the robot may move the cue is gone: without memory nobody succeeds more often than 1 time in 4.
    policy (8)        position - middle of the room [m], velocity [m/s], the cue as one-hot (4) while shown, then zeros
    privileged (4)    the cue as one-hot, always
    reward            0.5 per metre that the landmark comes nearer, 1.0 on reaching it
    ends              at any of the landmarks, right or wrong; time-out after 4 s (40 steps)

Pixels, for ppo_cnn.py: drive to the goal and touch none of the 5 crates, all of them placed anew in each episode.
    policy (2)        velocity [m/s]
    image (2, 24, 24) uint8: how much of each pixel, a square of 0.3 m, is covered by the goal (channel 0) and by crates
                      (channel 1), 255 = all of it. Rows go south, columns east, the robot is in the middle: egocentric
    privileged (12)   goal - position (2) and crates - position (5 x 2) [m]
    reward            0.5 per metre that the goal comes nearer, 1.0 on reaching it, -1.0 on touching a crate
    ends              at the goal or a crate; time-out after 8 s (80 steps)

Maze, for ppo_rnd.py: find the goal at the far end of a maze, about 20 m from the start.
    policy (4)        position - middle of the maze [m], velocity [m/s]
    rnd (2)           position - middle of the maze [m]: novelty of the place alone
    reward            10.0 on reaching the goal, else 0
    ends              at the goal; time-out after 30 s (300 steps)

`Episode/success` is the share of environments whose latest finished episode reached its goal (0 before the first
ends). Every environment counts once, however long its episodes are and however few of them end.
"""

from __future__ import annotations

import torch
from tensordict import TensorDict

from .torch_env import TorchEnv

MASS, FORCE, DRAG, STEP_DT = 1.0, 4.0, 2.0, 0.1  # kg, N, N s/m, s
RADIUS, SIDE = 0.1, 0.5  # m: half the width of the robot; side of landmarks, goals and crates, which are all squares
CUE_STEPS = 4  # env steps
NUM_CRATES, NUM_PIXELS, PIXEL = 5, 24, 0.3  # crates; pixels along a side of the image; m per pixel
BINS = 4  # per metre, for counting visits

ROOM = ("....", "....", "....", "....")
MAZE = (
    "S..#.....",
    "...#.....",
    "...#..#..",
    "...#..#..",
    "......#..",
    "###...#..",
    "......#.G",
)

DEFAULTS = {
    "navigation-cue": dict(
        num_envs=512,
        num_steps_per_env=32,
        max_iterations=40,
        gamma=0.97,
        entropy_coef=0.005,
        actor_obs=("policy",),
        critic_obs=("policy", "privileged"),
        actor_hidden_dims=(64,),
        critic_hidden_dims=(64,),
        rnn_type="gru",
        rnn_hidden_dim=64,
    ),
    "navigation-pixels": dict(
        num_envs=256,
        num_steps_per_env=32,
        max_iterations=150,
        num_learning_epochs=3,
        gamma=0.98,
        entropy_coef=0.002,
        actor_obs=("policy", "image"),
        critic_obs=("policy", "privileged"),
        actor_hidden_dims=(64,),
        critic_hidden_dims=(64, 64),
        cnn_output_channels=(8, 16),
        cnn_kernel_size=(4, 3),
        cnn_stride=(2, 2),
    ),
    "navigation-maze": dict(
        num_envs=512,
        num_steps_per_env=32,
        max_iterations=200,
        actor_hidden_dims=(64, 64),
        critic_hidden_dims=(64, 64),
        rnd_obs=("rnd",),
        rnd_weight=10.0,  # times step_dt: 1.0
        rnd_learning_rate=3e-4,  # with 1e-3 the predictor may outrun the robot: 4 of 5 seeds
        rnd_num_outputs=8,
        rnd_predictor_hidden_dims=(64, 64),
        rnd_target_hidden_dims=(64, 64),
        rnd_state_normalization=True,
        rnd_reward_normalization=True,
    ),
}


def free_span(line: str, i: int) -> tuple[float, float]:
    """Lowest and highest coordinate [m] that the middle of the robot can take along a row or column of a map, between
    the walls to both sides of its cell i."""
    return line.rfind("#", 0, i) + 1 + RADIUS, (line + "#").find("#", i) - RADIUS


def find(world: tuple[str, ...], letter: str) -> tuple[float, float]:
    """Middle (x, y) [m] of the cell with this letter."""
    return next((row.index(letter) + 0.5, y + 0.5) for y, row in enumerate(world) if letter in row)


class Navigation(TorchEnv):
    """What the three tasks share: the robot in a walled world, its goal, and the rate of success.

    Args:
        world: the map, H strings of W characters.
        episode_length_s: time limit [s].
        num_envs: N.
        device: where all tensors live.
        seed: seed of everything random in the task.
        terminations: False: only the time limit ends an episode.
    """

    def __init__(self, world, episode_length_s, num_envs, device, seed, terminations):
        super().__init__(num_envs, 2, episode_length_s, STEP_DT, device, seed, terminations)
        self.world = world
        columns = ["".join(column) for column in zip(*world)]
        along_x = [[free_span(row, x) for x in range(len(row))] for row in world]
        along_y = [[free_span(column, y) for column in columns] for y in range(len(world))]
        self.spans = self._constant([along_x, along_y])  # (2, H, W, 2): axis, cell, lowest and highest coordinate [m]
        self.middle = self._constant([len(world[0]) / 2, len(world) / 2])  # (2,) m
        self.position, self.velocity, self.goal = (self._zeros(2) for _ in range(3))  # (N, 2) m, m/s, m
        self.reached = self._zeros() > 0.0  # (N,) bool: the robot is at its goal
        self.success = self._zeros()  # (N,) 1 where the latest finished episode ended at its goal
        self._trail = []  # positions that `render` drew in this episode

    def _constant(self, values):
        return torch.tensor(values, dtype=self.dtype, device=self.device)

    def _zeros(self, *shape):
        return torch.zeros(self.num_envs, *shape, dtype=self.dtype, device=self.device)

    def _move(self, actions):
        """m dv/dt = F a - c v, semi-implicit Euler; x first, then y, so that no corner is cut."""
        force = FORCE * actions.clamp(-1.0, 1.0)
        self.velocity += self.step_dt * (force - DRAG * self.velocity) / MASS
        for axis in (0, 1):
            x, y = self._place()  # (N,) each
            low, high = self.spans[axis][y, x].unbind(1)
            aim = self.position[:, axis] + self.step_dt * self.velocity[:, axis]
            self.position[:, axis] = aim.clamp(low, high)
            self.velocity[:, axis] *= self.position[:, axis] == aim  # a wall stops it

    def _place(self, per_metre=1):
        """Column and row, (N,) each, in a grid with so many lines per metre. NaN must stay out of an index: on a GPU it
        would stop the program before anybody is told about the NaN."""
        return (self.position * per_metre).nan_to_num().long().unbind(1)

    def _goal_distance(self):
        return (self.goal - self.position).norm(dim=1)  # (N,)

    def _touches(self, centres):
        """Whether the robot touches squares with the given centres, (N or 1, K, 2) or (K, 2) -> (N, K) bool."""
        return (centres - self.position[:, None]).abs().amax(2) < SIDE / 2 + RADIUS

    def _check_goal(self):
        self.reached.copy_(self._touches(self.goal[:, None])[:, 0])
        return self.reached

    def _restart(self, mask, position, goal):
        """Note how the finished episodes went, then put robot and goal at `position` and `goal`, (N, 2) each."""
        self._assign(mask, success=self.reached)
        self._assign(mask, reached=False, velocity=0.0, position=position, goal=goal)

    def _groups(self, **groups):
        return TensorDict(groups, batch_size=[self.num_envs], device=self.device)

    def render(self):
        """(H, W, 3) uint8 picture of environment 0."""
        import numpy as np

        position = tuple(self.position[0].tolist())
        self._trail = [*self._trail, position] if self._episode_length[0] > 0 else [position]
        picture = Picture(self.world)
        picture.floor()
        self._draw(picture)
        picture.robot(self._trail, self.velocity[0].tolist())
        return np.asarray(picture.image())

    def _draw(self, picture):
        """Draw what the task adds to the map."""
        picture.square(self.goal[0].tolist(), GOAL_COLOR)


class Cue(Navigation):
    """Drive to the landmark that a cue named before the robot was allowed to move. Needs memory.

    Args:
        num_envs: N.
        device: where all tensors live.
        seed: seed of cues and starts.
        play: accepted for uniformity; the task has no randomisation to switch off.
        terminations: False: only the time limit ends an episode.
    """

    capturable = True

    def __init__(self, num_envs, device="cpu", seed=0, play=False, terminations=True):
        super().__init__(ROOM, 4.0, num_envs, device, seed, terminations)
        self.landmarks = self._constant([[0.5, 0.5], [3.5, 0.5], [0.5, 3.5], [3.5, 3.5]])  # (4, 2)
        self.one_hots = torch.eye(4, dtype=self.dtype, device=self.device)
        self.cue = self._zeros(4)  # (N, 4) one-hot
        self.reset_all()

    def _advance(self, actions):
        before = self._goal_distance()
        can_move = self._episode_length > CUE_STEPS
        self._move(actions * can_move[:, None])
        reached = self._check_goal()
        at_landmark = self._touches(self.landmarks).any(1)
        rewards = 0.5 * (before - self._goal_distance()) + reached
        return rewards, at_landmark, {"Episode/success": torch.where(self.reached, 1.0, self.success)}

    def _reset(self, mask):
        index = self._uniform(0.0, 4.0).long()  # (N,)
        self._assign(mask, cue=self.one_hots[index])
        self._restart(mask, self.middle + self._uniform(-0.5, 0.5, 2), self.landmarks[index])

    def _shown(self):
        return self._episode_length < CUE_STEPS  # (N,) bool

    def _observe(self):
        shown = self.cue * self._shown()[:, None]
        policy = torch.cat((self.position - self.middle, self.velocity, shown), 1)
        return self._groups(policy=policy, privileged=self.cue.clone())

    def _draw(self, picture):
        for landmark, color in zip(self.landmarks.tolist(), LANDMARK_COLORS):
            picture.square(landmark, color)
        if self._shown()[0]:
            picture.halo(self.position[0].tolist(), LANDMARK_COLORS[int(self.cue[0].argmax())])


class Pixels(Navigation):
    """Drive to the goal between crates, both of which only the image shows. Needs vision.

    Args:
        num_envs: N.
        device: where all tensors live.
        seed: seed of robots, goals and crates.
        play: accepted for uniformity; the task has no randomisation to switch off.
        terminations: False: only the time limit ends an episode.
    """

    capturable = True

    def __init__(self, num_envs, device="cpu", seed=0, play=False, terminations=True):
        super().__init__(ROOM, 8.0, num_envs, device, seed, terminations)
        self.cells = self._constant([[x + 0.5, y + 0.5] for y in range(4) for x in range(4)])  # (16, 2)
        self.crates = self.cells[None, :NUM_CRATES].repeat(num_envs, 1, 1)  # (N, K, 2)
        self.pixels = (torch.arange(NUM_PIXELS, device=self.device) - NUM_PIXELS / 2 + 0.5) * PIXEL  # m, middles
        self.reset_all()

    def _advance(self, actions):
        before = self._goal_distance()
        self._move(actions)
        reached = self._check_goal()
        crashed = self._touches(self.crates).any(1)
        rewards = 0.5 * (before - self._goal_distance()) + reached - 1.0 * crashed
        return rewards, reached | crashed, {"Episode/success": torch.where(self.reached, 1.0, self.success)}

    def _reset(self, mask):
        # Robot, goal and crates in different cells, up to 0.1 m off the middle: the robot fits between any two crates.
        order = self._uniform(0.0, 1.0, 16).argsort(1)[:, : 2 + NUM_CRATES]
        places = self.cells[order] + self._uniform(-0.1, 0.1, 2 + NUM_CRATES, 2)  # (N, 2 + K, 2)
        self._assign(mask, crates=places[:, 2:])
        self._restart(mask, places[:, 0], places[:, 1])

    def _coverage(self, centres):
        """Part of each pixel that squares at `centres` (N, K, 2) cover: (N, 24, 24), rows y, columns x.

        The part of a square is the product of the parts of its two sides, and the squares do not overlap.
        """
        offset = (centres - self.position[:, None])[..., None]  # (N, K, 2, 1) m
        overlap = (SIDE + PIXEL) / 2 - (self.pixels - offset).abs()  # (N, K, 2, 24) m
        x, y = (overlap / PIXEL).clamp(0.0, min(1.0, SIDE / PIXEL)).unbind(2)  # (N, K, 24) each
        return y.mT.contiguous() @ x

    def _observe(self):
        image = torch.stack((self._coverage(self.goal[:, None]), self._coverage(self.crates)), 1)
        image = image.mul_(255.0).round_().to(torch.uint8)  # (N, 2, 24, 24)
        things = torch.cat((self.goal[:, None], self.crates), 1) - self.position[:, None]  # (N, 1 + K, 2)
        return self._groups(policy=self.velocity.clone(), image=image, privileged=things.flatten(1))

    def _draw(self, picture):
        super()._draw(picture)
        for crate in self.crates[0].tolist():
            picture.square(crate, CRATE_COLOR)

    def render(self):
        """(H, W, 3) uint8 picture of environment 0, and to its right what the robot sees."""
        import numpy as np
        from PIL import Image, ImageColor

        floor, goal, crate = (np.array(ImageColor.getrgb(c)) for c in (FLOOR_COLOR, GOAL_COLOR, CRATE_COLOR))
        covered = self._obs["image"][0, :, :, :, None].cpu().numpy() / 255.0  # (2, 24, 24, 1)
        seen = floor + covered[0] * (goal - floor) + covered[1] * (crate - floor)  # (24, 24, 3)
        scene = super().render()
        size = (len(scene), len(scene))
        return np.hstack((scene, np.asarray(Image.fromarray(seen.astype(np.uint8)).resize(size, Image.NEAREST))))


class Maze(Navigation):
    """Find the goal at the end of a maze; nothing but the goal is rewarded. Needs exploration.

    `visits` (28, 36) counts the env steps, over all environments and since the start, in each square of 0.25 m;
    `draw_occupancy` makes a picture of it. `Metrics/visited` is the share of the squares that were ever visited.

    Args:
        num_envs: N.
        device: where all tensors live.
        seed: seed of the starts.
        play: accepted for uniformity; the task has no randomisation to switch off.
        terminations: False: only the time limit ends an episode.
    """

    capturable = True

    def __init__(self, num_envs, device="cpu", seed=0, play=False, terminations=True):
        super().__init__(MAZE, 30.0, num_envs, device, seed, terminations)
        self.start, self.end = (self._constant(find(MAZE, letter)) for letter in "SG")  # (2,) each
        self.visits = torch.zeros(len(MAZE) * BINS, len(MAZE[0]) * BINS, dtype=torch.long, device=self.device)
        self.num_squares = BINS**2 * sum(letter != "#" for row in MAZE for letter in row)
        self.reset_all()

    def _advance(self, actions):
        self._move(actions)
        reached = self._check_goal()
        x, y = self._place(BINS)
        self.visits.view(-1).scatter_add_(0, y * self.visits.shape[1] + x, torch.ones_like(x))
        visited = (self.visits > 0).sum() / self.num_squares
        log = {"Episode/success": torch.where(self.reached, 1.0, self.success), "Metrics/visited": visited}
        return 10.0 * reached, reached, log

    def _reset(self, mask):
        self._restart(mask, self.start + self._uniform(-0.2, 0.2, 2), self.end.expand_as(self.goal))

    def _observe(self):
        place = self.position - self.middle
        return self._groups(policy=torch.cat((place, self.velocity), 1), rnd=place)


# ---- Pictures ----

FLOOR_COLOR, WALL_COLOR, GOAL_COLOR, CRATE_COLOR = "#f4f1ea", "#37474f", "#2b8a3e", "#8d6e63"
LANDMARK_COLORS = ("#e03131", "#1c7ed6", "#f59f00", "#7048e8")
ROBOT_COLOR, TRAIL_COLOR = "#d9480f", "#f0a884"
PALE_BLUE, DARK_BLUE = (208, 228, 245), (8, 48, 107)
SCALE, FINE = 60, 3  # picture elements per metre; drawn this much finer, then reduced


class Picture:
    """A map seen from above, in metres.

    Args:
        world: the map, H strings of W characters.
    """

    def __init__(self, world):
        from PIL import Image, ImageDraw

        self.world = world
        self.size = ((len(world[0]) + 1) * SCALE, (len(world) + 1) * SCALE)  # half a metre of wall around the map
        self.canvas = Image.new("RGB", (self.size[0] * FINE, self.size[1] * FINE), WALL_COLOR)
        self.draw = ImageDraw.Draw(self.canvas)

    def _at(self, x, y):
        return (x + 0.5) * SCALE * FINE, (y + 0.5) * SCALE * FINE

    def cell(self, x, y, color, side=1.0):
        """Fill a square of the map whose north-western corner is at (x, y)."""
        self.draw.rectangle((*self._at(x, y), *self._at(x + side, y + side)), fill=color)

    def floor(self):
        for y, row in enumerate(self.world):
            for x, letter in enumerate(row):
                if letter != "#":
                    self.cell(x, y, FLOOR_COLOR)

    def square(self, centre, color):
        x, y = centre
        box = (*self._at(x - SIDE / 2, y - SIDE / 2), *self._at(x + SIDE / 2, y + SIDE / 2))
        self.draw.rounded_rectangle(box, radius=0.08 * SCALE * FINE, fill=color)

    def disc(self, centre, radius, color):
        x, y = centre
        self.draw.ellipse((*self._at(x - radius, y - radius), *self._at(x + radius, y + radius)), fill=color)

    def halo(self, centre, color):
        self.disc(centre, 2.4 * RADIUS, color)
        self.disc(centre, 1.6 * RADIUS, FLOOR_COLOR)

    def robot(self, trail, velocity):
        """The robot at the end of its trail, with an arrow for its velocity."""
        for start, end in zip(trail, trail[1:]):
            self.draw.line((*self._at(*start), *self._at(*end)), fill=TRAIL_COLOR, width=4 * FINE)
        x, y = trail[-1]
        self.disc((x, y), RADIUS, ROBOT_COLOR)
        tip = self._at(x + 0.2 * velocity[0], y + 0.2 * velocity[1])
        self.draw.line((*self._at(x, y), *tip), fill=ROBOT_COLOR, width=4 * FINE)

    def image(self):
        from PIL import Image

        return self.canvas.resize(self.size, Image.LANCZOS)


def draw_occupancy(visits: torch.Tensor):
    """Picture of where the robots of `Maze` have been: `env.visits` -> (H, W, 3) uint8.

    From pale to dark blue with the logarithm of the count; the plain floor was never visited.
    """
    import numpy as np

    shade = visits.double().log1p()
    shade = (shade / shade.max().clamp(min=1.0)).tolist()
    picture = Picture(MAZE)
    picture.floor()
    for y, row in enumerate(shade):
        for x, share in enumerate(row):
            if share > 0.0:
                color = tuple(round(a + share * (b - a)) for a, b in zip(PALE_BLUE, DARK_BLUE))
                picture.cell(x / BINS, y / BINS, color, 1 / BINS)
    picture.square(find(MAZE, "G"), GOAL_COLOR)
    return np.asarray(picture.image())
