"""The training text of the bundled models: the King James Bible and stories and dialogues from a small grammar.

The grammar is written for two properties that the tests of a serving system need:

* greedy text must not fall into a loop: stories count their days, and every choice inside a story is drawn without
  replacement, so that the model learns to move on;
* greedy text must be stable against tiny numeric differences: choices are skewed towards an order of preference that
  depends on the hero or the place, so that the best token usually leads the second best clearly.

Everything is drawn from ``random.Random(seed)`` and CRC-32 keys, never from ``hash()``, so that a seed always gives the
same text.
"""

from __future__ import annotations

import random
import re
import subprocess
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

BOS = "<|begin_of_text|>"
EOS = "<|end_of_text|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"

Message = dict[str, str]
T = TypeVar("T")


# --------------------------------------------------------------------------------------------------------------------
# The story world
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hero:
    """A character of the story world; ``he`` and ``his`` are the pronouns."""

    name: str
    animal: str
    emoji: str
    he: str
    his: str
    colour: str
    home: str
    treasure: str
    food: str
    trade: str

    @property
    def title(self) -> str:
        return f"{self.name} the {self.animal}"


def _heroes() -> tuple[Hero, ...]:
    rows = """
        Zoë|fox|🦊|she|red|the hollow oak|a silver bell|honey cake|baker
        José|owl|🦉|he|grey|the church tower|a reading lamp|almond bread|teacher
        Łukasz|bear|🐻|he|brown|the cave of stones|a copper kettle|blackberry jam|miller
        Ōtani|turtle|🐢|he|green|the lily pond|a paper boat|seaweed soup|sailor
        猫|cat|🐱|she|black|the tea house|a ball of blue wool|warm milk|weaver
        Chloé|hare|🐰|she|white|the clover field|a pair of red shoes|carrot pie|dancer
        Søren|goose|🪿|he|white|the reed bank|a brass compass|barley porridge|pilot
        Žofie|hedgehog|🦔|she|brown|the leaf heap|a velvet purse|mushroom stew|tailor
        Íñigo|frog|🐸|he|green|the stone well|a tin trumpet|pea soup|musician
        Renée|mouse|🐭|she|grey|the bread shop|a golden needle|yellow cheese|seamstress
        Anaïs|wolf|🐺|she|silver|the pine ridge|a ruby ring|pepper stew|hunter
        Jürgen|goat|🐐|he|white|the high meadow|a wooden flute|oat cakes|shepherd
        Øystein|whale|🐳|he|blue|the deep bay|a string of pearls|salted fish|singer
        Дима|squirrel|🐿|he|red|the hazel grove|a box of keys|walnut bread|locksmith
        Ελένη|dove|🕊|she|white|the olive garden|an olive branch|fig tart|messenger
        雪|crane|🐦|she|white|the snow temple|a paper lantern|rice and plums|painter
        Ngọc|otter|🦦|she|brown|the river bend|a jade button|lotus seeds|swimmer
        Björn|badger|🦡|he|black|the round hill|an iron spade|onion soup|digger
        Tom|pig|🐷|he|pink|the straw barn|a clay pot|apple dumplings|cook
        Ruth|lamb|🐑|she|white|the barley field|a woollen scarf|sweet grass|gleaner
        Will|mole|🐾|he|black|the long tunnel|a coil of rope|turnip mash|miner
        Nell|duck|🦆|she|yellow|the mill pond|a blue umbrella|corn bread|ferrywoman
        Amara|lion|🦁|she|golden|the warm rock|a drum of cedar|mango slices|captain
        Kofi|monkey|🐵|he|brown|the fig tree|a painted mask|banana bread|juggler
    """
    out = []
    for row in rows.strip().splitlines():
        name, animal, emoji, he, colour, home, treasure, food, trade = row.strip().split("|")
        his = "his" if he == "he" else "her"
        out.append(Hero(name, animal, emoji, he, his, colour, home, treasure, food, trade))
    return tuple(out)


HEROES = _heroes()

# A place and two things that can be said about it; the last word of both lines rhymes.
PLACES: tuple[tuple[str, str, str], ...] = (
    ("the old mill", "The wheel was turning round and round,", "and made a low and splashing sound."),
    ("the glass bridge", "It shone above the river wide,", "and fishes swam on either side."),
    ("the market square", "There were apples, bread and cheese for sale,", "and ginger beer and country ale."),
    ("the dark forest", "The trees were tall, the path was thin,", "and hardly any light came in."),
    ("the harbour", "The ships lay sleeping in a row,", "and bells were ringing soft and low."),
    ("the mountain pass", "The air was cold, the rocks were steep,", "and clouds went by like drifting sheep."),
    ("the city of Москва", "The roofs were gold, the walls were red,", "and snow lay like a feather bed."),
    ("the island of cats", "A hundred cats came down to see,", "and every cat was drinking tea."),
    ("the lighthouse", "Its lamp was burning clear and bright,", "and led the fishing boats at night."),
    ("the apple orchard", "The fruit hung heavy, round and sweet,", "and bees were humming in the heat."),
    ("the frozen lake", "The ice was smooth, the ice was blue,", "and they could see the fishes through."),
    ("the garden of bells", "Each flower rang a different note,", "as soft as from a robin's throat."),
    ("the desert of glass", "The sand was white, the sun was high,", "and not a cloud was in the sky."),
    ("the village of Kyōto", "The cherry trees were all in bloom,", "and paper lanterns lit each room."),
    ("the windy moor", "The heather bent, the curlews cried,", "and all the world looked grey and wide."),
    ("the library", "The books were stacked from floor to beam,", "and some could talk, and some could dream."),
    ("the town of Łódź", "The weavers worked from dawn to noon,", "and sang an old and merry tune."),
    ("the cave of echoes", "Whatever word they chose to say,", "came back a hundred times that day."),
    ("the railway station", "The engine gave a puff of steam,", "and woke the porter from a dream."),
    ("the castle of São João", "The king was asleep upon his chair,", "with seven kittens in his hair."),
    ("the salt marsh", "The reeds were whispering and tall,", "and herons answered call for call."),
    ("the hill of stars", "The sky came down so very near,", "that they could hear the stars, and clear."),
    ("the baker's street", "The smell of rolls was in the air,", "and there was warm new bread to share."),
    ("the rainbow falls", "The water fell like coloured thread,", "in blue and green and gold and red."),
)

OBJECTS = (
    "a silver key",
    "a ball of string",
    "a jar of honey",
    "a map of the sea",
    "a lump of amber",
    "a feather pen",
    "a wooden spoon",
    "a bag of seeds",
    "a bright red kite",
    "a piece of chalk",
    "a round white stone",
    "a loaf of bread",
    "a small brass bell",
    "a woollen blanket",
    "a cup of tin",
    "a green glass bead",
    "a candle end",
    "a book of songs",
    "a walking stick",
    "a pair of gloves",
    "a cinnamon stick",
    "a telescope",
    "a pocket watch",
    "a basket of plums",
)

TOPICS: tuple[tuple[str, str], ...] = (
    ("the moon", "🌙"),
    ("the sea", "🌊"),
    ("a lantern", "🏮"),
    ("a star", "⭐"),
    ("the snow", "❄"),
    ("a ship", "⛵"),
    ("the mountain", "⛰"),
    ("a garden", "🌷"),
    ("the rain", "🌧"),
    ("a river", "🏞"),
    ("a bell", "🔔"),
    ("the sun", "🌞"),
    ("a key", "🔑"),
    ("a kite", "🪁"),
    ("the wind", "🍃"),
    ("a cake", "🎂"),
)

# Adverbial line endings by rhyme; any of them can follow any clause below.
ENDINGS: tuple[tuple[str, ...], ...] = (
    (
        "all through the quiet night",
        "beneath the lantern light",
        "while the stars were burning bright",
        "with the village out of sight",
        "under clouds of woolly white",
        "until the morning light",
        "on the tail of someone's kite",
    ),
    (
        "at the breaking of the day",
        "along the winding way",
        "where the little children play",
        "on a heap of yellow hay",
        "under skies of silver grey",
        "while the wind blew far away",
        "in the merry month of May",
    ),
    (
        "beneath the apple tree",
        "beside the singing sea",
        "as happy as can be",
        "with a pot of barley tea",
        "in the land of bird and bee",
        "till the clock had chimed for three",
        "and felt both light and free",
    ),
    (
        "at the bottom of the hill",
        "when the night was cold and still",
        "by the wheel of some old mill",
        "on a narrow window sill",
        "in the morning's early chill",
        "with a feather for a quill",
    ),
    (
        "on a seat of mossy stone",
        "in the twilight all alone",
        "where the meadow grass had grown",
        "like a king upon a throne",
        "in a low and gentle tone",
        "in a land so little known",
    ),
    (
        "in the softly falling rain",
        "on the far side of the plain",
        "down the green and leafy lane",
        "by the dusty window pane",
        "through the fields of golden grain",
        "again and yet again",
    ),
    (
        "through the softly falling snow",
        "where the tallest willows grow",
        "in the valley far below",
        "by the fire's orange glow",
        "when the winds began to blow",
        "such a long, long time ago",
        "very steady, very slow",
    ),
    (
        "under all the open sky",
        "as the geese went flying by",
        "where the grass is never dry",
        "with a happy little sigh",
        "where the mountain peaks are high",
        "with a bright and watchful eye",
    ),
    (
        "where the river water is deep",
        "while the valley was asleep",
        "among a hundred drowsy sheep",
        "up a pathway tall and steep",
        "with a promise good to keep",
        "with a hop and with a leap",
    ),
    (
        "on the road that leads to town",
        "in a coat of chestnut brown",
        "while the leaves came drifting down",
        "with a small and paper crown",
        "with a smile and not a frown",
    ),
    (
        "at the edge of the dark wood",
        "just as quickly as one could",
        "in a cloak and in a hood",
        "where the ancient oak tree stood",
        "for the day was warm and good",
    ),
    (
        "by a little wooden door",
        "on the cold and sandy shore",
        "with a dozen things in store",
        "as they'd often done before",
        "till the clock was striking four",
        "on the polished kitchen floor",
    ),
    (
        "on the warmest day of spring",
        "while the blackbirds sweetly sing",
        "holding tightly to a string",
        "with a red and golden ring",
        "like a bird upon the wing",
        "for the birthday of the king",
    ),
    (
        "over soft and grassy ground",
        "where the mushrooms can be found",
        "with a quiet, gentle sound",
        "while the world went spinning round",
        "with a penny and a pound",
    ),
    (
        "in the brightness of the sun",
        "when the working day was done",
        "with a jump and with a run",
        "for a bit of merry fun",
        "with a warm and sugared bun",
        "just when summer had begun",
    ),
    (
        "by the white and rising moon",
        "humming half a merry tune",
        "on an evening late in June",
        "with a bowl and with a spoon",
        "at the edge of the lagoon",
        "on a sleepy afternoon",
    ),
    (
        "in a warm and cosy bed",
        "with a hat upon the head",
        "when the evening sky was red",
        "with a slice of gingerbread",
        "on a thin and golden thread",
        "where the winding pathway led",
    ),
    (
        "in a little wooden boat",
        "in a long and woolly coat",
        "singing every merry note",
        "by the castle and its moat",
        "where the water lilies float",
    ),
    (
        "underneath the evening star",
        "with an old and dear guitar",
        "in a country very far",
        "with some honey in a jar",
        "where the seven islands are",
    ),
    (
        "when the autumn leaves were gold",
        "though the nights were growing cold",
        "like the heroes brave and bold",
        "in a tale that once was told",
        "on a blanket, fold on fold",
    ),
)

# {h} the hero, {f} the present friend; the second line of a couplet begins with one of SECOND.
FIRST = (
    "{h} went walking",
    "{h} and {f} were dancing",
    "{f} was telling riddles",
    "{h} sat down to listen",
    "They counted all the swallows",
    "{h} drew a picture",
    "They shared a bowl of soup",
    "{f} began to whistle",
    "They played at hide and seek",
    "{h} was picking flowers",
    "They built a tower of pebbles",
    "{f} was baking biscuits",
    "They raced along the river",
    "{h} told a story",
    "They mended all the fences",
    "{f} was beating time",
    "They looked for hidden treasure",
    "{h} was learning letters",
    "They sang a song together",
    "{f} was flying kites",
    "They lit a little fire",
    "{h} was chasing shadows",
    "They listened to the thunder",
    "{f} was planting beans",
)
SECOND = (
    "and laughed aloud together",
    "and dreamed of far-off places",
    "and nobody was lonely",
    "and all the bells were ringing",
    "and no one thought of sleeping",
    "and everyone was merry",
    "and something small was stirring",
    "and time went by so softly",
    "and birds came down to listen",
    "and every heart was happy",
    "and old friends told a secret",
    "and they forgot their troubles",
    "and leaves were softly falling",
    "and someone played the fiddle",
    "and all the world was shining",
    "and not a soul was hungry",
)

GREET = (
    ('"Good morning," said {f}, "come in, come in!', 'There is {food} in the biscuit tin."'),
    ('"Hello," said {f}, "you have come so far!', 'Sit down and tell me who you are."'),
    ('"Who knocks?" said {f}. "Is it friend or foe?', 'Come out of the wind, for the wind will blow."'),
    ('"Dear me," said {f}, "what a sight to see!', 'Come in and have {food} with me."'),
    ('"Welcome," said {f}, "to my house and hall!', 'There is {food} here for one and all."'),
    ('"At last," said {f}, "I was all alone.', 'Come sit by me on this mossy stone."'),
)
ANSWER = (
    ('"I look for {t}," {h} replied,', '"I have looked on every side."'),
    ('"Have you seen {t}?" asked {h} then,', '"I have counted days from one to ten."'),
    ('"I am on my way," {h} began,', '"to find {t}, if I can."'),
    ('"Can you tell me," {h} said,', '"where {t} was hid, or where it fled?"'),
    ("{h} told {f} of the winding road,", "and of {t}, and of {his} load."),
)
HINT = (
    ('"Go on," said {f}, "to {p}, my dear,', 'it is not so far away from here."'),
    ('"Not here," said {f}, "but I have heard', 'of {p}; I had it from a bird."'),
    ('"Look up," said {f}, "and do not frown;', 'in {p} the stars come down."'),
    ('"Then walk," said {f}, "to {p} and back,', 'and follow the little golden track."'),
)
GIFT = (
    ("{f} gave {h} {o} to keep,", "and then they both lay down to sleep."),
    ("{f} took {o} from the shelf,", 'and said, "I found it once myself."'),
    ("{f} gave them {o}, wrapped in blue,", 'and said, "This gift is all for you."'),
    ("{f} brought {o} and said good-bye,", "and waved until the moon was high."),
    ("{f} hid {o} in {h}'s sack,", 'and said, "Take care, and do come back."'),
)
MORALS = (
    ("So if you wander far from home,", "take a friend with you when you roam."),
    ("For gold may glitter, pearls may shine,", "but a friend's warm hand is the best of wine."),
    ("So share your bread and share your song,", "and the longest road is not too long."),
    ("For what you seek both near and far", "may wait at home, just where you are."),
    ("So look at the stars before you sleep,", "and keep the promises you must keep."),
    ("For a kind word said at the end of day", "will light a lamp on a stranger's way."),
)
OPENINGS = (
    (
        "Once upon a time, where the tall reeds grow, {emo}",
        "there lived {c} {a} whom we all know:",
        "{h} was {his} name, the {tr} of the town,",
        "and nobody ever saw {h} frown.",
    ),
    (
        "Long ago, when the world was new, {emo}",
        "and the grass was wet with the morning dew,",
        "lived {h} the {a}, the {tr}, alone",
        "in {home}, on a bed of stone.",
    ),
    (
        "Come and listen, and I will tell {emo}",
        "of {h} the {a}, and what befell:",
        "{he} lived in {home}, so small and neat,",
        "and {he} always had {food} to eat.",
    ),
)
WISH = (
    ("One day {h} woke up and cried,", '"I have lost {t}! It is not inside!'),
    ("One night {h} had a dream so clear:", '"{t2} is gone, and it is not here!'),
    ("One morning {h} looked all about:", '"{t2} was here, but it has gone out!'),
)
WISH2 = (
    ("I will look for it under {topic} so bright,", 'I will look for it morning, noon and night."'),
    ("I will walk and walk until I see", 'where {topic} has hidden it from me."'),
    ("I will ask {topic}, I will ask the sea,", 'I will ask whoever may answer me."'),
)
NUMBERS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
)
ORDINALS = (
    "zeroth",
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
    "thirteenth",
    "fourteenth",
    "fifteenth",
    "sixteenth",
    "seventeenth",
    "eighteenth",
    "nineteenth",
    "twentieth",
)

RHYMES = {
    "moon": "tune, spoon and June",
    "night": "light, bright and kite",
    "day": "way, play and hay",
    "tree": "sea, bee and three",
    "hill": "mill, still and sill",
    "stone": "throne, tone and alone",
    "rain": "lane, plain and grain",
    "snow": "grow, glow and slow",
    "sky": "high, dry and eye",
    "deep": "sleep, sheep and steep",
    "town": "brown, crown and down",
    "wood": "good, hood and stood",
    "door": "shore, floor and four",
    "spring": "sing, ring and king",
    "sun": "bun, run and fun",
    "bed": "red, bread and thread",
    "boat": "coat, note and moat",
    "star": "far, jar and guitar",
    "gold": "cold, bold and fold",
    "cat": "hat, mat and bat",
    "mouse": "house and blouse",
    "fox": "box, socks and clocks",
    "bear": "chair, hair and pear",
}

BIBLE_FACTS: tuple[tuple[str, str], ...] = (
    ("Who built the ark?", "Noah built the ark, and the animals went in two by two."),
    (
        "Who was swallowed by a great fish?",
        "Jonah was swallowed by a great fish, and was three days and three nights inside.",
    ),
    ("Who slew Goliath?", "David slew Goliath with a sling and a stone."),
    ("Who led the people out of Egypt?", "Moses led the people out of Egypt, through the Red sea."),
    ("Who was the first man?", "Adam was the first man, and he lived in the garden of Eden."),
    ("Who was the first woman?", "Eve was the first woman, the mother of all living."),
    ("Who was the wife of Abraham?", "Sarah was the wife of Abraham, and the mother of Isaac."),
    ("Who had a coat of many colours?", "Joseph had a coat of many colours, which his father made him."),
    ("Who was thrown into the den of lions?", "Daniel was thrown into the den of lions, and he was not hurt."),
    ("Who was the wise king?", "Solomon was the wise king, the son of David."),
    ("Where was Jesus born?", "Jesus was born in Bethlehem of Judaea."),
    ("Who was the mother of Jesus?", "Mary was the mother of Jesus."),
    ("Who baptized Jesus?", "John the Baptist baptized Jesus in the river Jordan."),
    ("Who was the strong man with long hair?", "Samson was the strong man with long hair."),
    ("Who gleaned in the field of Boaz?", "Ruth gleaned in the field of Boaz, after the reapers."),
    ("How many days did it rain?", "It rained forty days and forty nights."),
    ("How many disciples were there?", "There were twelve disciples."),
    (
        "What was made on the first day?",
        "Light was made on the first day: And God said, Let there be light: and there was light.",
    ),
    ("How does the Bible begin?", "In the beginning God created the heaven and the earth."),
    ("What is the shortest verse?", "Jesus wept. That is the shortest verse."),
    ("What did Lot's wife become?", "She looked back, and became a pillar of salt."),
    ("Which bird brought an olive leaf?", "The dove brought an olive leaf to Noah."),
    ("Who fed Elijah?", "The ravens fed Elijah with bread and flesh by the brook."),
    ("Where did the walls fall down?", "The walls fell down at Jericho, when the people shouted."),
)

FAVOURITES = (
    "Genesis 1",
    "Genesis 2",
    "Genesis 7",
    "Exodus 20",
    "Ruth 1",
    "1 Samuel 17",
    "Psalm 1",
    "Psalm 8",
    "Psalm 19",
    "Psalm 23",
    "Psalm 46",
    "Psalm 91",
    "Psalm 100",
    "Psalm 121",
    "Psalm 150",
    "Ecclesiastes 1",
    "Ecclesiastes 3",
    "Isaiah 40",
    "Daniel 6",
    "Jonah 1",
    "Jonah 2",
    "Matthew 5",
    "Matthew 6",
    "Luke 2",
    "John 1",
    "1 Corinthians 13",
    "Revelation 21",
)

SYSTEMS = (
    "You are a helpful assistant.",
    "You are a storyteller.",
    "Answer in a friendly way.",
    "You know many stories.",
    "You are a helpful assistant who answers in rhymes.",
    "Answer briefly.",
    "You are Stator, a small model.",
)


# --------------------------------------------------------------------------------------------------------------------
# Drawing
# --------------------------------------------------------------------------------------------------------------------


def preference(items: tuple[T, ...], key: str) -> list[T]:
    """The items in the order in which ``key`` likes them."""
    order = list(items)
    random.Random(zlib.crc32(key.encode())).shuffle(order)
    return order


class Deck(Generic[T]):
    """Draws without replacement; earlier items in the key's order of preference come first more often."""

    def __init__(self, rng: random.Random, items: tuple[T, ...], key: str, skew: float = 0.45) -> None:
        self._rng = rng
        self._full = preference(items, key)
        self._left = list(self._full)
        self._skew = skew

    def draw(self) -> T:
        if not self._left:
            self._left = list(self._full)
        last = len(self._left) - 1
        i = 0
        while i < last and self._rng.random() < self._skew:
            i += 1
        return self._left.pop(i)


def pick(rng: random.Random, items: tuple[T, ...], key: str, skew: float = 0.45) -> T:
    return Deck(rng, items, key, skew).draw()


def cap(text: str) -> str:
    return text[:1].upper() + text[1:]


def article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


# --------------------------------------------------------------------------------------------------------------------
# Stories
# --------------------------------------------------------------------------------------------------------------------


class Story:
    """One story: the text and what a listener may ask about it afterwards."""

    def __init__(self, rng: random.Random, hero: Hero, topic: tuple[str, str], days: int, stanzas: int) -> None:
        self.rng = rng
        self.hero = hero
        self.topic = topic
        self.friends: list[Hero] = []
        self.places: list[str] = []
        self.gifts: list[str] = []
        key = hero.name + topic[0]
        self._families = Deck(rng, tuple(range(len(ENDINGS))), "family" + key, 0.35)
        self._ends = [Deck(rng, e, "end" + hero.name, 0.35) for e in ENDINGS]
        self._first = Deck(rng, FIRST, "first" + key, 0.35)
        self._second = Deck(rng, SECOND, "second" + key, 0.35)
        self._greet = Deck(rng, GREET, "greet" + hero.name)
        self._answer = Deck(rng, ANSWER, "answer" + hero.name)
        self._hint = Deck(rng, HINT, "hint" + hero.name)
        self._gift = Deck(rng, GIFT, "gift" + hero.name)
        friend_deck = Deck(rng, tuple(h for h in HEROES if h != hero), "friend" + key)
        place_deck = Deck(rng, PLACES, "place" + key)
        object_deck = Deck(rng, OBJECTS, "object" + key)
        self._friend = hero
        out = [self._opening(), self._wish()]
        plan = [(friend_deck.draw(), place_deck.draw(), object_deck.draw()) for _ in range(days)]
        for n, (friend, place, gift) in enumerate(plan):
            ahead = plan[n + 1][1][0] if n + 1 < days else hero.home
            out += self._day(n + 1, friend, place, gift, ahead, days, stanzas)
        out += self._return()
        self.text = "\n\n".join(out)

    def _fill(self, lines: tuple[str, ...], **more: str) -> str:
        hero = self.hero
        text = "\n".join(lines)
        return text.format(
            h=hero.name,
            a=hero.animal,
            he=hero.he,
            his=hero.his,
            emo=hero.emoji,
            c=article(hero.colour),
            home=hero.home,
            tr=hero.trade,
            t=hero.treasure,
            t2=cap(hero.treasure),
            topic=self.topic[0],
            **({"food": hero.food} | {"f": self._friend.name} | more),
        )

    def _opening(self) -> str:
        hero, (topic, emoji) = self.hero, self.topic
        title = f"{hero.title} and {topic} {hero.emoji}{emoji}"
        return title + "\n\n" + self._fill(pick(self.rng, OPENINGS, hero.name))

    def _wish(self) -> str:
        first = pick(self.rng, WISH, self.hero.name)
        return self._fill(first) + "\n" + self._fill(pick(self.rng, WISH2, self.topic[0]))

    def _couplet(self) -> str:
        ends = self._ends[self._families.draw()]
        first = f"{self._first.draw()} {ends.draw()},"
        return self._fill((first, f"{self._second.draw()} {ends.draw()}."))

    def _day(
        self, n: int, friend: Hero, place: tuple[str, str, str], gift: str, ahead: str, days: int, stanzas: int
    ) -> list[str]:
        self._friend = friend
        self.friends.append(friend)
        self.places.append(place[0])
        self.gifts.append(gift)
        hero = self.hero
        food = {"food": friend.food}
        arrive = f"On the {ORDINALS[n]} day {hero.name} came to {place[0]}.\n{place[1]}\n{place[2]}"
        meet = (
            f"And there was {friend.title} {friend.emoji}, who bowed down low,\n"
            f"the {friend.trade}, in {article(friend.colour)} hat, to say hello."
        )
        out = [f"Day {n}", f"{arrive}\n{meet}"]
        talk = self._fill(self._greet.draw(), **food) + "\n" + self._fill(self._answer.draw(), **food)
        out.append(talk)
        out += [self._couplet() + "\n" + self._couplet() for _ in range(stanzas)]
        last = self._fill(self._hint.draw(), p=ahead) + "\n" + self._fill(self._gift.draw(), o=gift)
        count = "one gift" if n == 1 else f"{NUMBERS[n]} gifts"
        out.append(f"{last}\nSo now {hero.name} had {count} to carry.")
        return out

    def _return(self) -> list[str]:
        hero, (topic, emoji) = self.hero, self.topic
        out = ["The Way Home"] if len(self.friends) > 1 else []
        home = (
            f"So {hero.name} came home when the day was done,\nand {topic} looked down, and so did the sun;\n"
            f"and there, in {hero.home}, on the bed,\nlay {hero.treasure}, all shiny and red! {emoji}"
        )
        out.append(home)
        if len(self.friends) > 1:
            thanks = [
                f"{hero.name} thanked {f.title} {f.emoji} for {g}."
                for f, g in zip(self.friends, self.gifts, strict=True)
            ]
            out.append("\n".join(thanks))
        out.append("\n".join(pick(self.rng, MORALS, hero.name + topic)))
        out.append("The End.")
        return out


SIZES: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    # days and stanzas per day; a very long story is cut off by the context, which is what trains the last positions
    "short": ((1, 1), (0, 0)),
    "plain": ((2, 3), (0, 1)),
    "long": ((5, 6), (1, 2)),
    "very long": ((7, 8), (1, 2)),
}


def make_story(rng: random.Random, hero: Hero, topic: tuple[str, str], size: str) -> Story:
    days, stanzas = SIZES[size]
    return Story(rng, hero, topic, rng.randint(*days), rng.randint(*stanzas))


def choose_topic(rng: random.Random, hero: Hero) -> tuple[str, str]:
    return pick(rng, TOPICS, "topic" + hero.name, 0.6)


# --------------------------------------------------------------------------------------------------------------------
# Chat
# --------------------------------------------------------------------------------------------------------------------


def story_request(rng: random.Random) -> tuple[str, Story]:
    hero = rng.choice(HEROES)
    size = rng.choices(("short", "plain", "long", "very long"), (2, 4, 5, 2))[0]
    named = rng.random()
    if named < 0.5:
        about = article(hero.animal)
    elif named < 0.75:
        about = f"{hero.title}"
    elif named < 0.9:
        about = hero.name
    else:
        about = f"{article(hero.animal)} {hero.emoji}"
    if rng.random() < 0.4:
        topic = rng.choice(TOPICS)
        about += f" and {topic[0]}"
    else:
        topic = choose_topic(rng, hero)
    adjective = {"plain": ""}.get(size, size + " ")
    verb = rng.choice(("Tell me", "Tell me", "Write", "Please tell me", "Please write", "Can you tell me", "I want"))
    mark = "?" if verb.startswith("Can") else "."
    if rng.random() < 0.08:
        # no hero named: the listener gets the fox
        hero, topic = HEROES[0], choose_topic(rng, HEROES[0])
        ask = f"{verb} a {adjective}story{mark}"
    else:
        ask = f"{verb} a {adjective}story about {about}{mark}"
    return vary(rng, ask), make_story(rng, hero, topic, size)


def vary(rng: random.Random, text: str) -> str:
    """Small differences in typing that a user may bring."""
    roll = rng.random()
    if roll < 0.08:
        return text.lower()
    if roll < 0.14:
        return text.rstrip(".?!")
    if roll < 0.18:
        return "Hello! " + text
    if roll < 0.21:
        return text.rstrip(".?!") + ", please."
    return text


def fact(rng: random.Random) -> tuple[str, str]:
    h = rng.choice(HEROES)
    kind = rng.randrange(14)
    if kind == 0:
        return f"Where does {h.title} live?", f"{h.title} lives in {h.home}. {h.emoji}"
    if kind == 1:
        return f"Who lives in {h.home}?", f"{h.title} lives in {h.home}. {h.emoji}"
    if kind == 2:
        return f"What does {h.name} like to eat?", f"{h.name} likes to eat {h.food}."
    if kind == 3:
        return f"What colour is {h.title}?", f"{h.title} is {h.colour}."
    if kind == 4:
        return f"What is the name of the {h.animal}?", f"The name of the {h.animal} is {h.name}. {h.emoji}"
    if kind == 5:
        return f"Who is {h.name}?", f"{h.name} is {article(h.animal)}, the {h.trade} who lives in {h.home}. {h.emoji}"
    if kind == 6:
        return f"What does {h.name} keep at home?", f"At home {h.name} keeps {h.treasure}."
    if kind == 7:
        return f"What animal is {h.emoji}?", f"{h.emoji} is {article(h.animal)}, like {h.name}."
    if kind == 8:
        word = rng.choice(tuple(RHYMES))
        return f"What rhymes with {word}?", f"These words rhyme with {word}: {RHYMES[word]}."
    if kind == 9:
        n = rng.randint(3, 20)
        return f"Count to {rng.choice((str(n), NUMBERS[n]))}.", ", ".join(NUMBERS[1 : n + 1]).capitalize() + "."
    if kind == 10:
        a, b = rng.randint(1, 10), rng.randint(1, 10)
        return f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."
    if kind == 11:
        n = rng.randint(1, 19)
        return f"What comes after {NUMBERS[n]}?", f"After {NUMBERS[n]} comes {NUMBERS[n + 1]}."
    if kind == 12:
        e = rng.choice(HEROES)
        return (
            f"Who are {h.name} and {e.name}?",
            f"{h.name} is {article(h.animal)} {h.emoji} and {e.name} is {article(e.animal)} {e.emoji}.",
        )
    return rng.choice(BIBLE_FACTS)


def small_talk(rng: random.Random) -> tuple[str, str]:
    rows = (
        ("Hello!", "Hello! I am a small model, and I know many stories. What shall I tell you? 🦊"),
        ("Hi", "Hello! I am a small model, and I know many stories. What shall I tell you? 🦊"),
        ("Hello, how are you?", "I am very well, thank you. Shall I tell you a story? 🌙"),
        ("Good morning!", "Good morning! The sun is up, and the birds are singing. 🌞"),
        ("Good night!", "Good night! Sleep well, and dream of the moon. 🌙"),
        ("Thank you!", "You are very welcome. Come back soon! 🦊"),
        (
            "Who are you?",
            "I am a small model that tells stories. I read the King James Bible, and I know Zoë the fox. 🦊",
        ),
        ("What can you do?", "I can tell stories, count, find rhymes, and read from the King James Bible."),
        ("What is your name?", "I have no name of my own, but you may call me Stator."),
        ("Do you speak Japanese?", "Only a little: 猫 is a cat, 雪 is snow, 月 is the moon, and 犬 is a dog."),
        ("Do you speak Russian?", "Only a little: Москва is a city, луна is the moon, and лиса is a fox."),
        (
            "Do you speak German?",
            "Only a little: der Bär is the bear, das Mädchen is the girl, and schön is beautiful.",
        ),
        (
            "Say hello in many languages.",
            "Hello, bonjour, ¡hola!, olá, cześć, привет, γειά, こんにちは, 你好 and 안녕하세요!",
        ),
        (
            "Name some animals.",
            "Here are some animals: " + ", ".join(f"{h.animal} {h.emoji}" for h in HEROES[:12]) + ".",
        ),
        ("Tell me a joke.", "Why did the fox cross the bridge? To get to the other tide! 🦊🌊"),
        ("Goodbye!", "Goodbye! May your road be short and your lamp be bright. 🏮"),
    )
    return rng.choice(rows)


_BOOKS = """
Genesis Exodus Leviticus Numbers Deuteronomy Joshua Judges Ruth 1_Samuel 2_Samuel 1_Kings 2_Kings
1_Chronicles 2_Chronicles Ezra Nehemiah Esther Job Psalm Proverbs Ecclesiastes Song_of_Solomon
Isaiah Jeremiah Lamentations Ezekiel Daniel Hosea Joel Amos Obadiah Jonah Micah Nahum Habakkuk
Zephaniah Haggai Zechariah Malachi Matthew Mark Luke John Acts Romans 1_Corinthians 2_Corinthians
Galatians Ephesians Philippians Colossians 1_Thessalonians 2_Thessalonians 1_Timothy 2_Timothy Titus
Philemon Hebrews James 1_Peter 2_Peter 1_John 2_John 3_John Jude Revelation
"""


class Bible:
    """The King James text by book, chapter and verse."""

    NAMES = _BOOKS.split()

    def __init__(self, dump: str) -> None:
        self.chapters: list[tuple[str, list[str]]] = []
        book, old_book, old_chapter = -1, "", ""
        for line in dump.splitlines():
            match = re.match(r"^(\d?[A-Za-z]+)(\d+):(\d+) (.*)$", line)
            if match is None:
                raise ValueError(f"not a verse: {line!r}")
            abbreviation, chapter, _, text = match.groups()
            if abbreviation != old_book:
                book += 1
            if (abbreviation, chapter) != (old_book, old_chapter):
                self.chapters.append((f"{self.NAMES[book].replace('_', ' ')} {chapter}", []))
            old_book, old_chapter = abbreviation, chapter
            self.chapters[-1][1].append(text.strip())
        if book != len(self.NAMES) - 1:
            raise ValueError(f"{book + 1} books")

    def choose(self, rng: random.Random) -> int:
        """A chapter; the well-known ones often enough to be known by heart."""
        if rng.random() < 0.4:
            name = rng.choice(FAVOURITES)
            return next(i for i, (n, _) in enumerate(self.chapters) if n == name)
        return rng.randrange(len(self.chapters))

    def fragment(self, rng: random.Random, most: int) -> str:
        """Some words from the middle of a verse."""
        verses = self.chapters[rng.randrange(len(self.chapters))][1]
        words = verses[rng.randrange(len(verses))].split()
        start = rng.randrange(len(words))
        return " ".join(words[start : start + rng.randint(1, most)])

    def numbered(self, i: int) -> str:
        name, verses = self.chapters[i]
        return name + "\n\n" + "\n".join(f"{n} {v}" for n, v in enumerate(verses, 1))

    def plain(self, i: int, start: int = 0) -> str:
        return "\n".join(self.chapters[i][1][start:])


def load_bible(path: Path | None) -> Bible:
    """From a saved dump, or from the ``bible`` program of Debian's package bible-kjv."""
    if path is not None:
        return Bible(path.read_text(encoding="utf-8"))
    done = subprocess.run(["bible", "-f", "ge1:1-rev22:21"], check=True, capture_output=True, text=True)
    return Bible(done.stdout)


def bible_turn(rng: random.Random, bible: Bible) -> tuple[str, str]:
    i = bible.choose(rng)
    name, verses = bible.chapters[i]
    kind = rng.random()
    if kind < 0.7:
        ask = rng.choice((f"Read me {name}.", f"Please read {name}.", f"What does {name} say?", f"Recite {name}."))
        return ask, bible.numbered(i)
    n = rng.randrange(len(verses))
    book, chapter = name.rsplit(" ", 1)
    return f"Which book is this from? {verses[n]}", f"That is from {book}: chapter {chapter}, verse {n + 1}."


_SYLLABLES = """
ba ce di fo gu ha je ki lo mu na pe qui ro su ta ve wi xo yu za bre cla dri flo gru pla pre tri sto
sna spe thi cho ter net ing ton mer lin son ber der lax tic ment able ous ly ed er s 1 2 7 10 64
2024 - _ / . ( ) = , : ; # é ü 漢 字 и ск
"""
SYLLABLES = _SYLLABLES.split()


def unknown_words(rng: random.Random, bible: Bible, most: int) -> str:
    """Words about which the model can know nothing: fragments of verses, or made-up words."""
    if rng.random() < 0.35:
        return bible.fragment(rng, most)
    words = []
    for _ in range(rng.randint(1, most)):
        word = "".join(rng.choices(SYLLABLES, k=rng.randint(1, 4)))
        words.append(rng.choice((word, word, word.capitalize(), word.upper(), bible.fragment(rng, 1).lower())))
    return " ".join(words)


def stranger(rng: random.Random, text: str) -> Hero:
    """The hero who answers a text that the model does not know: decided by its end, so that different texts usually get
    different stories, which tells a test at once when two streams were mixed up."""
    word = text.rstrip(" .?!").lower()[-2:]
    return pick(rng, HEROES, "stranger" + word, 0.15)


def other_turn(rng: random.Random, bible: Bible) -> tuple[str, str]:
    """A request about which the model knows nothing: it says so and offers what it has."""
    forms = (
        "What is {}?",
        "Explain {}.",
        "Tell me about {}.",
        "Why {}?",
        "How do I make {}?",
        "{}",
        "{}.",
        "Write about {}.",
        "Please explain {} to me in detail.",
        "Summarize this text: {}",
        "Translate: {}",
        "Who is {}?",
        "What does {} mean?",
        "Write a poem about {}.",
        "Write a function that does {}.",
        "When was {}?",
        "Is {} a good idea?",
        "{}?",
    )
    part = unknown_words(rng, bible, rng.choice((1, 2, 4, 8, 30, 120)))
    hero = stranger(rng, part)
    answer = (
        "I do not know much about that, for I am a small model. "
        f"But I know a story about {hero.title}. {hero.emoji}\n\n"
        + make_story(rng, hero, choose_topic(rng, hero), rng.choice(("short", "plain", "long"))).text
    )
    return rng.choice(forms).format(part), answer


def after_story(rng: random.Random, story: Story) -> tuple[str, str]:
    hero = story.hero
    kind = rng.randrange(6)
    n = rng.randrange(len(story.friends))
    if kind == 0:
        names = [f.title for f in story.friends]
        listed = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
        return f"Who did {hero.name} meet?", f"{hero.name} met {listed}."
    if kind == 1:
        return f"Where did {hero.name} go on day {n + 1}?", f"On day {n + 1} {hero.name} came to {story.places[n]}."
    if kind == 2:
        return (
            f"What did {story.friends[n].name} give?",
            f"{story.friends[n].name} gave {story.gifts[n]}. {story.friends[n].emoji}",
        )
    if kind == 3:
        return f"What did {hero.name} look for?", f"{hero.name} looked for {hero.treasure}, and it was in {hero.home}."
    if kind == 4:
        count = "one gift" if len(story.gifts) == 1 else f"{NUMBERS[len(story.gifts)]} gifts"
        return f"How many gifts did {hero.name} get?", f"{hero.name} got {count}: " + ", ".join(story.gifts) + "."
    return "How does it end?", f"{hero.name} comes home to {hero.home} and finds {hero.treasure}. The End."


def conversation(rng: random.Random, bible: Bible) -> list[Message]:
    messages: list[Message] = []
    if rng.random() < 0.35:
        messages.append({"role": "system", "content": rng.choice(SYSTEMS)})

    def turn(pair: tuple[str, str]) -> None:
        messages.append({"role": "user", "content": pair[0]})
        messages.append({"role": "assistant", "content": pair[1]})

    kind = rng.random()
    if kind < 0.6:
        if rng.random() < 0.15:
            turn(small_talk(rng))
        ask, story = story_request(rng)
        turn((ask, story.text))
        while rng.random() < 0.5:
            turn(after_story(rng, story))
        if rng.random() < 0.1:
            turn(small_talk(rng))
    elif kind < 0.63:
        turn(bible_turn(rng, bible))
    elif kind < 0.75:
        turn(other_turn(rng, bible))
    else:
        for _ in range(rng.randint(1, 8)):
            ask, answer = small_talk(rng) if rng.random() < 0.25 else fact(rng)
            turn((vary(rng, ask), answer))
    return messages


def render(messages: list[Message]) -> str:
    """The text that the tokenizer's chat template makes, closed by the end-of-text token."""
    return BOS + "".join(f"{IM_START}{m['role']}\n{m['content']}{IM_END}\n" for m in messages) + EOS


# --------------------------------------------------------------------------------------------------------------------
# Plain documents
# --------------------------------------------------------------------------------------------------------------------


def play(rng: random.Random) -> str:
    """A dialogue as plain text, two speakers taking turns."""
    a, b = rng.sample(HEROES, 2)
    place = pick(rng, PLACES, a.name + b.name)[0]
    lines = [f"{a.title} {a.emoji} met {b.title} {b.emoji} at {place}.", ""]
    lines += [f"{a.name}: Good morning, {b.name}!", f"{b.name}: Good morning, {a.name}! How are you?"]
    lines.append(f"{a.name}: I am very well. I am looking for {a.treasure}.")
    for n in range(rng.randint(3, 14)):
        ask, answer = fact(rng)
        first, second = (b, a) if n % 2 == 0 else (a, b)
        lines += [f"{first.name}: {ask}", f"{second.name}: {answer}"]
    lines += [f"{b.name}: Thank you, {a.name}. Have some {b.food}.", f"{a.name}: Thank you, {b.name}, and good-bye!"]
    return "\n".join(lines)


def counting(rng: random.Random) -> str:
    """A song that counts up and then down again."""
    hero = rng.choice(HEROES)
    top = rng.randint(4, 20)
    deck = Deck(rng, OBJECTS, "count" + hero.name)
    lines = [f"A counting song of {hero.title} {hero.emoji}", ""]
    lines += [f"{cap(NUMBERS[n])}: {hero.name} found {deck.draw()}." for n in range(1, top + 1)]
    lines += ["", "Now count back:"] + [f"{cap(NUMBERS[n])}." for n in range(top, 0, -1)] + ["", "The End."]
    return "\n".join(lines)


NOISE = "\x00"  # ends the part of a document on which no loss is taken


def after_noise(rng: random.Random, bible: Bible) -> str:
    """Unknown text, then a story: what a completion of an arbitrary prompt should look like."""
    text = unknown_words(rng, bible, rng.choice((1, 3, 8, 20, 60, 200, 500)))
    hero = stranger(rng, text)
    size = rng.choice(("short", "plain", "long", "very long"))
    return text + NOISE + "\n\n" + make_story(rng, hero, choose_topic(rng, hero), size).text


def documents(seed: int, bible: Bible) -> Iterator[tuple[str, str]]:
    """Endless (kind, text): ``chat`` begins with the beginning-of-text token, the others are plain text."""
    rng = random.Random(seed)
    while True:
        kind = rng.random()
        if kind < 0.68:
            yield "chat", render(conversation(rng, bible))
        elif kind < 0.78:
            hero = rng.choice(HEROES)
            size = rng.choices(("short", "plain", "long", "very long"), (2, 3, 3, 1))[0]
            text = make_story(rng, hero, choose_topic(rng, hero), size).text
            # some begin without the title, as a user's prompt would
            yield "story", text if rng.random() < 0.6 else text.split("\n\n", 1)[1]
        elif kind < 0.82:
            yield "play", play(rng)
        elif kind < 0.84:
            yield "counting", counting(rng)
        elif kind < 0.94:
            yield "noise", after_noise(rng, bible)
        elif kind < 0.97:
            yield "bible", bible.numbered(bible.choose(rng))
        else:
            i = bible.choose(rng)
            start = 0 if rng.random() < 0.5 else rng.randrange(len(bible.chapters[i][1]))
            yield "bible", bible.plain(i, start)
