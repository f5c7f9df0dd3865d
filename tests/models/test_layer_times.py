"The clock"
import time
from torch import nn
from fastai_tricks.models.layer_times import layer_times, speedup

def test_clock_tells_slow_from_fast():
    "A layer that sleeps is slower than one that does not"
    class Slow(nn.Conv2d):
        def forward(self, x): time.sleep(.003); return super().forward(x)
    fast,slow = nn.Conv2d(4,4,3,padding=1),Slow(4,4,3,padding=1)
    assert speedup(layer_times(slow, fast, (1,4,8,8), turns=2))>1.5 and speedup(layer_times(fast, slow, (1,4,8,8), turns=2))<.7

def test_hooks_of_a_layer_are_not_called_for_random_input():
    conv,calls = nn.Conv2d(4,4,3),[]
    conv.register_forward_hook(lambda *args: calls.append(1))
    layer_times(conv, nn.Conv2d(4,4,3), (1,4,8,8), turns=1)
    assert not calls
