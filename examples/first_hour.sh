#!/usr/bin/env bash
# The way of a first hour, in a few minutes: an environment of your own, a policy trained on it, two algorithms compared
# over three seeds, adaptation to one task, a loop, self-improvement, and the page.
#
# bash examples/first_hour.sh [FOLDER]
set -euo pipefail

example=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/own_family.py
folder=${1:-first-hour}

# 1. A folder of your own, with an environment: a goal on a line, which the observation does not show.
mkdir -p "$folder"
cp "$example" "$folder"
cd "$folder"

# 2. Train. At the end a table has the return on new goals before and after one gradient step.
ssm-metarl train --task own_family:HiddenGoal --iterations 15 --seed 1 --run-dir runs/first

# 3. Compare two algorithms over three seeds: a gradient step, and memory alone, which is slower to learn.
ssm-metarl train --task own_family:HiddenGoal --iterations 30 --episodes 10 --seeds 0 1 2 --run-dir runs/promp
ssm-metarl train --task own_family:HiddenGoal --algorithm rl2 --outer-lr 3e-3 --iterations 30 --episodes 10 \
    --seeds 0 1 2 --run-dir runs/rl2
ssm-metarl compare runs/promp runs/rl2 --out report.html

# 4. Adapt the first policy to one goal.
ssm-metarl adapt runs/first --params '{"goal": 0.7}' --out adapted

# 5. Use a policy in a loop of your own, as trained and as adapted.
python - <<'PYTHON'
from own_family import HiddenGoal

from ssm_metarl import load_player


def play(player):
    env = HiddenGoal()
    env.set_task({"goal": 0.7})
    observation, _ = env.reset(seed=0)
    action, total = player.act(observation), 0.0
    for _ in range(env.horizon):
        observation, reward, terminated, truncated, _ = env.step(action)
        action, total = player.act(observation, reward=reward), total + reward
    return total


print(f"one episode: return {play(load_player('runs/first')):.2f} as trained")
print(f"one episode: return {play(load_player('adapted/policy')):.2f} as adapted")
PYTHON

# 6. Let a policy find its own options while it trains. Small batches leave room for races in a small budget.
ssm-metarl evolve --task own_family:HiddenGoal --meta-batch 10 --episodes 8 --proposals 2 --seed 1 \
    --budget 2e5 --run-dir runs/evolved
ssm-metarl evaluate runs/evolved

# 7. Open the page. You would look at it in a browser and end it with Ctrl-C; here a script asks for it, and ends it.
port=$(python -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
ssm-metarl app --port "$port" --storage runs &
page=$!
trap 'kill "$page"; wait "$page" || true' EXIT
ask="import urllib.request as web; print(web.urlopen('http://127.0.0.1:$port', timeout=60).read().decode())"
until no_proxy=127.0.0.1 python -c "$ask" >page.html 2>/dev/null; do
    kill -0 "$page" # a page that has ended ends this script, too
    sleep 1
done
echo "What the page answered: $folder/page.html"
