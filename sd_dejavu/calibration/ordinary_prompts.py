"""Ordinary prompts: the null distribution for a real Stable Diffusion model.

A p-value compares a prompt with prompts nobody trained on, so these are written by a small grammar of
our own rather than copied from a caption list. They keep the idioms of web captions (stock-photo
titles, product names, news lines, 'How To ...'), because against bland prompts any detector would
look good: letter case alone tells the usual memorised list from the usual ordinary one. All people,
towns and shops are invented.

A slot ``{name}`` of the grammar stands for one of its options, which may hold slots themselves;
within one prompt no option is used twice while another is left.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random
from statistics import median

STYLES = ("sentence", "title", "tags", "short", "long")

_MAX_FAILURES_IN_A_ROW = 1000


def _options(text: str) -> tuple[str, ...]:
    return tuple(" ".join(option.split()) for option in text.split(";"))


_WORDS: dict[str, tuple[str, ...]] = {
    # ------------------------------------------------------------------------------- what is shown
    "animal": _options(
        "fox; hare; otter; badger; heron; owl; kingfisher; tabby cat; sheepdog; pony; donkey; goat; highland cow;"
        "lamb; hedgehog; squirrel; robin; magpie; tortoise; tree frog; duckling; piglet; elephant; giraffe; zebra;"
        "lynx; wolf; brown bear; seal; puffin; pelican; parrot; rooster; swan; beagle; kitten; alpaca; raccoon;"
        "penguin; deer"
    ),
    "person": _options(
        "old fisherman; young violinist; baker; girl in a yellow raincoat; boy with freckles; gardener; potter;"
        "woman with curly hair; man with a grey beard; bride; nurse; cyclist; hiker; street musician; schoolteacher;"
        "beekeeper; farmer; carpenter; ballet dancer; toddler; grandmother; student; lifeguard; postman;"
        "chess player; climber; shopkeeper; astronaut; knight; wizard; pirate; sailor; seamstress; barber; tourist;"
        "jogger"
    ),
    "ware": _options(
        "vase; teapot; candle holder; serving bowl; coffee mug; picture frame; table lamp; mirror; planter; tray;"
        "kettle; jewelry box; storage jar; birdhouse; fruit bowl; wall clock; lantern; soap dish; letter opener;"
        "umbrella stand"
    ),
    "cloth": _options(
        "quilt; rug; scarf; tote bag; backpack; throw pillow; shower curtain; doormat; wallet; phone case; apron;"
        "blanket; tablecloth; sun hat; pencil pouch; lunch bag; dog collar; cardigan; slipper; laptop sleeve"
    ),
    "furniture": _options(
        "armchair; bookshelf; rocking chair; side table; garden bench; writing desk; bar stool; sofa; dresser"
    ),
    "gear": _options(
        "bicycle; typewriter; rowing boat; guitar; accordion; sewing machine; watering can; camper van; toy train;"
        "globe; suitcase; tricycle; chess set; music box; umbrella; fountain pen; birdcage; tractor; canoe; radio;"
        "tram; kite; delivery truck; wheelbarrow; telescope; piano; tent; scooter; hot air balloon; sailing boat;"
        "mailbox; vintage car"
    ),
    "object": ("{ware}", "{cloth}", "{furniture}", "{gear}", "{gear}"),
    "food": _options(
        "lemon tart; tomato soup; blueberry pancakes; sourdough loaf; mushroom risotto; apple crumble; fish stew;"
        "pumpkin bread; noodle salad; roast carrots; cherry pie; oat cookies; potato gratin; lentil curry; fig jam;"
        "ginger cake; spinach omelette; peach sorbet; bean tacos; plum cake; onion dumplings; rice pudding"
    ),
    "building": _options(
        "lighthouse; windmill; farmhouse; stone cottage; chapel; boathouse; railway station; greenhouse; castle;"
        "market hall; log cabin; library; covered bridge; water mill; observatory; monastery; barn; city hall;"
        "tea house; bus shelter; clock tower; townhouse; swimming pool; petrol station; opera house; school building"
    ),
    "scene": _options(
        "harbour; mountain lake; pine forest; lavender field; desert road; river delta; fjord; waterfall;"
        "rice terrace; vineyard; salt marsh; canyon; sandy beach; orchard; glacier; meadow; cliff path; birch grove;"
        "tidal pool; bay; village square; fish market; rooftop garden; cobbled alley; snowy valley; volcano;"
        "coral reef; suburban street; bamboo grove; railway yard; city skyline; playground; moorland; lagoon; quarry"
    ),
    "room": _options(
        "kitchen; living room; hallway; bathroom; nursery; reading corner; home office; balcony; bedroom; porch;"
        "laundry room"
    ),
    "thing": ("{animal}", "{object}", "{food}", "{building}", "{scene}", "{person}"),
    "seen": ("{look} {object}", "{air} {building}", "{air} {scene}", "{trait} {animal}"),
    "seen_any": ("{seen}", "{taste} {food}", "{colour} {object}", "{made}"),
    "made": ("{hard} {ware}", "{soft} {cloth}", "{hard} {furniture}"),
    # ------------------------------------------------------------------------------------ how it is
    "look": _options(
        "old; small; rusty; weathered; colourful; abandoned; elegant; modern; rustic; giant; tiny; crooked; dusty;"
        "broken; gleaming; vintage; delicate; sturdy; faded; charming; futuristic; ornate; plain; whimsical; bright;"
        "shabby; hand-painted; half-finished; folding; miniature; antique; second-hand; large; curious; muddy; wet"
    ),
    "air": _options(
        "quiet; cosy; lonely; sleepy; misty; sunlit; mossy; snowy; peaceful; overgrown; busy; deserted; windswept;"
        "hidden; picturesque; crowded; tranquil; rain-soaked; ancient; flooded; frozen; lively; gloomy; remote"
    ),
    "trait": _options(
        "sleepy; curious; tiny; young; old; wet; fluffy; muddy; proud; hungry; lonely; shy; friendly; tired; grumpy;"
        "plump; brave; startled; playful; scruffy"
    ),
    "taste": _options("homemade; creamy; fresh; spicy; rustic; vegan; warm; quick; sticky; easy; gluten-free; smoky"),
    "colour": _options(
        "red; blue; green; yellow; black; white; grey; teal; orange; pink; purple; brown; navy; mustard; ivory;"
        "turquoise; crimson; olive; golden; silver; lilac; dark green; cream; coral; burgundy; mint"
    ),
    "hard": _options(
        "ceramic; wooden; brass; glass; copper; bamboo; wicker; stainless steel; marble; oak; concrete; enamel;"
        "walnut; porcelain; cast iron; reclaimed wood; painted metal"
    ),
    "soft": _options("leather; linen; velvet; cotton; wool; canvas; silk; felt; denim; corduroy; knitted; quilted"),
    "pattern": _options(
        "striped; floral; geometric; polka dot; checked; marbled; tie-dye; herringbone; paisley; botanical; abstract;"
        "plaid"
    ),
    "hard_part": _options(
        "handle; lid; drawer; brass feet; gold rim; stand; wooden base; glass front; carved edge; hook"
    ),
    "soft_part": _options(
        "zip pocket; fringe; shoulder strap; embroidered edge; tassels; snap button; red lining; name tag"
    ),
    "doing": _options(
        "waiting for the ferry; reading a newspaper; feeding pigeons; walking along the shore; laughing in the rain;"
        "carrying a basket of apples; repairing a net; playing the cello; looking out of a window;"
        "asleep in a hammock; holding a lantern; painting a fence; crossing a narrow bridge; drinking tea;"
        "picking blackberries; flying a kite; writing a letter; pushing a wheelbarrow; standing under a street lamp;"
        "tuning a radio"
    ),
    "animal_doing": _options(
        "sleeping on a doorstep; drinking from a puddle; running through tall grass; hiding behind a flowerpot;"
        "staring at the camera; wrapped in a blanket; sitting on a stone wall; crossing the road; jumping over a log;"
        "curled up in a basket; looking for food in the snow; resting on a warm rock; eating a carrot;"
        "wearing a tiny knitted hat; reflected in still water; splashing in the rain"
    ),
    "where": _options(
        "in the snow; by the sea; on a hill; at the forest edge; in an empty street; under a bridge; near a pond;"
        "against a brick wall; on the beach; in a field of poppies; beside the railway; in a busy market;"
        "behind a wooden fence; in the desert; below a mountain; behind the greenhouse; on a pier;"
        "in a walled garden; next to a campfire; by a frozen lake; on a gravel path; in a small courtyard;"
        "under an apple tree"
    ),
    "when": _options(
        "at dawn; at dusk; in autumn; on a rainy afternoon; in early spring; at noon; after the storm; in winter;"
        "on a summer evening; by moonlight; before sunrise; on market day; during a thunderstorm; in late October;"
        "under a starry sky; on a foggy morning"
    ),
    "season": _options("spring; summer; autumn; winter"),
    "weather": _options("sunset; sunrise; fog; snow; rain; moonlight; mist; storm; dusk; dawn"),
    "in_weather": _options(
        "at sunset; at sunrise; at dusk; at dawn; in fog; in the snow; in moonlight; after the rain"
    ),
    # ------------------------------------------------------------------------------- how it is made
    "medium": _options(
        "photo; photograph; painting; drawing; watercolour; pencil sketch; illustration; close-up; oil painting;"
        "black and white photo; woodcut; linocut print; pastel drawing; collage; polaroid; screenprint"
    ),
    "tag_medium": _options(
        "digital art; oil on canvas; watercolour; 35mm film; concept art; pencil sketch; 3d render; ink drawing;"
        "isometric; pixel art; storybook illustration; macro photography; analog photo; low poly; gouache;"
        "flat vector; matte painting; long exposure; paper cutout; claymation; comic panel; travel poster; charcoal;"
        "product shot"
    ),
    "quality": _options(
        "highly detailed; sharp focus; 8k; intricate; masterpiece; best quality; hdr; photorealistic; clean lines;"
        "4k; high resolution; elegant; depth of field; bokeh; film grain; smooth; ultra realistic; award winning;"
        "cinematic; textured; minimalist; vivid colours; muted palette; symmetrical; rule of thirds; wide angle;"
        "85mm; centered"
    ),
    "light": _options(
        "soft light; golden hour; volumetric lighting; rim light; neon glow; overcast; studio lighting; backlit;"
        "candlelight; dramatic shadows; god rays; moonlit; warm light; low key; window light; blue hour; harsh flash"
    ),
    "mood": _options(
        "serene; moody; dreamlike; cheerful; mysterious; nostalgic; melancholic; epic; playful; eerie; calm"
    ),
    "keyword": _options(
        "travel; nature; outdoors; background; nobody; texture; landscape; season; water; europe; rural;"
        "architecture; tourism; hobby; weekend; interior; closeup; wildlife; handmade; vacation; family; tradition;"
        "morning; industry"
    ),
    # ------------------------------------------------------------------------------- invented names
    "given": _options(
        "Marta; Owen; Ines; Tobias; Petra; Callum; Noor; Jonas; Freya; Emil; Lucia; Bram; Sanna; Dario; Wilma;"
        "Hector; Ayla; Ruben; Greta; Silas; Ottilie; Kasper; Maeve; Anton"
    ),
    "family": tuple(
        start + end
        for start in [
            "Hal",
            "Var",
            "Tess",
            "Ost",
            "Mar",
            "Pell",
            "Quin",
            "Bren",
            "Lund",
            "Cor",
            "Dray",
            "Fen",
            "Gol",
            "Ister",
            "Wex",
            "Thorn",
        ]
        for end in ["ley", "brook", "mer", "wick", "holt", "venson", "dale", "ridge", "quist", "combe"]
    ),
    "name": ("{given} {family}",),
    "town": tuple(
        start + end
        for start in [
            "Ash",
            "Elm",
            "Wick",
            "Stan",
            "Hol",
            "Bar",
            "Lin",
            "Mer",
            "Dun",
            "Kel",
            "Rav",
            "Tor",
            "Win",
            "Sel",
        ]
        for end in ["haven", "bury", "mouth", "ford", "ness", "minster", "by", "stead", "vale", "gate"]
    ),
    "place": ("{town}", "Lake {town}", "Port {town}", "{town} Bay", "{town} Valley", "Old {town}", "{town} Island"),
    "number": tuple(str(n) for n in (5, 7, 8, 9, 10, 11, 12, 14, 15, 17, 20, 21, 23, 25, 30, 40)),
    "year": tuple(str(n) for n in range(1902, 2020)),
    "code": tuple(f"{letters}-{n}" for letters in ["KT", "HB", "RM", "LV", "DX"] for n in range(113, 990, 29)),
    "size": _options("30 cm; 12 inch; set of 2; set of 4; large; small; 16x20; pack of 6; one size; extra wide"),
    # ------------------------------------------------------------------------------------ the styles
    "subject": (
        "a {look} {object}",
        "a {colour} {gear}",
        "a {air} {building}",
        "a {person} {doing}",
        "a {animal} {animal_doing}",
    ),
    "sentence": (
        "a {medium} of a {scene} {when}",
        "a {medium} of a {colour} {gear} {where}",
        "a {air} {building} {where} {when}",
        "a {person} {doing} {when}",
        "the {trait} {animal} is {animal_doing}",
        "there is a {colour} {gear} {where}",
        "a {look} {furniture} with a {colour} {cloth}",
        "two {colour} boats and a {air} {building} {when}",
        "a plate of {food} next to a {colour} {ware}",
        "a {person} and a {trait} {animal} {where}",
        "view of the {scene} near {place} {when}",
        "{name} reopens the {air} {building} {when}",
        "residents of {town} gather at the {building} {when}",
        "my {trait} {animal} {animal_doing}",
        "this {room} has a {look} {furniture} and a {colour} {cloth}",
    ),
    "title": (
        "{colour} {hard} {ware} with {hard_part}",
        "{pattern} {soft} {cloth} with {soft_part}",
        "{pattern} {colour} {cloth} - {size} - item {code}",
        "{seen_any} stock photo",
        "{trait} {animal} on {colour} background royalty free illustration",
        "{air} {scene} {in_weather} wall art print",
        "{scene} {in_weather} - {cloth} by {name}",
        "how to paint a {seen} in {number} easy steps",
        "how to clean a {made} at home",
        "{number} {look} {room} ideas with a {colour} {furniture}",
        "{number} things to do in {place} in {season}",
        "{taste} {food} with {food} | family recipe",
        "{scene} at {place}, {year}",
        "portrait of a {person} by {name}",
        "{name}: the {trait} {animal} and other stories",
        "{town} council reopens {building} after {number} years",
        "{name} wins {town} {animal} photo contest",
        "vintage postcard - {building} in {place}, {year}",
        "{hard} {furniture} for {room} - {colour} / {size}",
        "the {air} {building} of {place} - a novel by {name}",
        "{season} walk to the {building} | {place} travel blog",
        "{name} and the {town} quartet live at the {building}",
        "{look} {room} with {pattern} {cloth} and {colour} {furniture}",
    ),
    "tags": (
        "{colour} {object}, {tag_medium}, {quality}, {light}",
        "{seen_any}, {light}, {mood}, {quality}, {quality}, {tag_medium}",
        "{animal}, {scene}, {weather}, {keyword}, {keyword}, {keyword}",
        "{scene}, {colour}, {keyword}, {keyword}, {building}",
        "{person}, {mood}, {light}, {quality}, {tag_medium}, {quality}",
        "portrait of a {person}, {tag_medium}, {light}, {quality}, {quality}",
        "{quality}, {quality}, {air} {scene}, {colour} sky, {light}, {mood}",
        "a {air} {building} {where}, {tag_medium}, {quality}, {light}, {mood}",
        "{taste} {food}, {colour} plate, {light}, {quality}, {keyword}",
        "{tag_medium}, {trait} {animal}, {colour} background, {quality}",
        "{medium} of a {look} {object}, {quality}, {quality}, {quality}, {light}, {light}, {mood}",
    ),
    "short": (
        "{seen}",
        "{colour} {object}",
        "{look} {colour} {object}",
        "{made}",
        "{colour} {made}",
        "{trait} {animal}",
        "{animal} {medium}",
        "{scene} {weather}",
        "{town} {building}",
        "{colour} {pattern} {cloth}",
        "{look} {made}",
        "{mood} {scene}",
        "{building} {medium}",
        "{food} recipe",
        "{room} {furniture}",
        "{town} {year}",
        "{name}",
        "{place}",
        "{thing}",
    ),
    "detail": (
        "with a {colour} {gear} standing {where}",
        "while a {person} is {doing}",
        "while a {trait} {animal} is {animal_doing}",
        "surrounded by {colour} flowers and a broken fence",
        "with the {air} {building} of {town} in the background",
        "where {subject} can just be seen",
        "lit by a {colour} lamp {where}",
        "while a few neighbours watch from a distance",
    ),
    "finish": (
        "painted in the manner of an old {season} postcard",
        "taken with a wide lens from the roof of the {building}",
        "with muted {colour} and {colour} tones and plenty of empty space",
        "so that everything looks {mood} and a little out of time",
        "drawn for a children's book about life in {town}",
        "the long shadows and the {colour} sky make it feel {mood}",
    ),
    "long": (
        "a {medium} of {subject} {where} {when}, {detail}, {finish}",
        "a detailed {medium} that shows {subject} {when}, {detail}",
        "{subject} not far from the {air} {building}, {detail}, {detail}",
        "we spent the whole day near {place} and found {subject} {where}, {detail}",
        "{name} of {town} stands next to a {person} on the day the {building} was opened again {when}, {detail}",
        "this {pattern} {soft} {cloth} comes in {colour} or {colour} and goes with a {soft} {cloth} or {furniture}",
        "this {colour} {hard} {ware} with {hard_part} fits any {room}, shown here next to a {look} {furniture}, {size}",
        "imagine a {air} {scene} {when}, {detail}, and in the middle of it {subject}, {finish}",
        "looking down at the {scene} of {place} {when}, {detail}, {finish}",
    ),
}

_SLOT = re.compile(r"\{(\w+)\}")
_A_BEFORE_VOWEL = re.compile(r"\b([Aa]) (?=[aeiouAEIOU])(?!one|uni|use|eu)")
_SMALL_WORDS = frozenset(["a", "an", "and", "at", "by", "for", "from", "in", "of", "on", "or", "the", "to", "with"])

_NOT_CASED_IN_TITLES = _SMALL_WORDS | frozenset(["as", "is", "near", "next", "beside"])
_SENTENCE_WORDS = frozenset(
    [
        "a",
        "an",
        "the",
        "one",
        "two",
        "three",
        "this",
        "that",
        "there",
        "my",
        "your",
        "his",
        "her",
        "its",
        "our",
        "their",
        "is",
        "are",
        "was",
        "were",
    ]
)


def ordinary_prompts(count: int, seed: int = 0, styles: Sequence[str] = STYLES) -> list[tuple[str, str]]:
    """``count`` distinct (prompt, style), styles in equal shares and in turn.

    Distinct also without regard to letter case, which CLIP's tokenizer drops. The same arguments give
    the same prompts on every machine, and a smaller count gives the beginning of a larger one, so that
    a profile can be extended.
    """
    if count < 0:
        raise ValueError(f"the number of prompts is {count}: give 0 or more")
    if unknown := [style for style in styles if style not in STYLES]:
        raise ValueError(f"prompt style {unknown[0]!r} is unknown; known styles: {', '.join(STYLES)}")
    if not styles:
        raise ValueError(f"no prompt style is given: name at least one of {', '.join(STYLES)}")
    rng = Random(seed)
    found: list[tuple[str, str]] = []
    seen: set[str] = set()
    failures = 0
    while len(found) < count:
        style = styles[len(found) % len(styles)]
        prompt = _one(style, rng)
        if (folded := prompt.casefold()) not in seen:
            seen.add(folded)
            found.append((prompt, style))
            failures = 0
        elif (failures := failures + 1) > _MAX_FAILURES_IN_A_ROW:
            raise ValueError(
                f"{count} distinct prompts are too many: style {style!r} ran out after {len(found)} prompts; "
                "ask for fewer, or for more styles"
            )
    return found


def style_of(prompt: str) -> str:
    """Which of :data:`STYLES` a prompt is nearest to. The first rule that fits decides:

    1. at most 2 words: *short*;
    2. at least 60% of the words in Title Case (small words such as 'of', 'the' do not count): *title*;
    3. commas, with at most 3 words in the median part between them: *tags*;
    4. at least 13 words: *long*;
    5. at most 3 words, or at most 6 with no article, number word, possessive, 'is' or 'are': *short*;
    6. all else: *sentence*.

    A word is anything between blanks that holds a letter or a digit.
    """
    words = [w for w in prompt.split() if any(c.isalnum() for c in w)]
    if len(words) <= 2:
        return "short"
    bare = [re.sub(r"^\W+|\W+$", "", w) for w in words]
    telling = [w for w in bare if w[:1].isalpha() and w.lower() not in _NOT_CASED_IN_TITLES]
    if sum(w[0].isupper() for w in telling) >= 0.6 * max(1, len(telling)):
        return "title"
    parts = [len(part.split()) for part in prompt.split(",") if part.strip()]
    if len(parts) > 1 and median(parts) <= 3:
        return "tags"
    if len(words) >= 13:
        return "long"
    if len(words) <= 3 or (len(words) <= 6 and not _SENTENCE_WORDS.intersection(w.lower() for w in bare)):
        return "short"
    return "sentence"


def _pick(options: Sequence[str], rng: Random) -> str:
    # Python promises the same stream for random(), not for choice().
    return options[int(rng.random() * len(options))]


def _expand(text: str, rng: Random, used: set[str]) -> str:
    def option(slot: re.Match[str]) -> str:
        options = _WORDS[slot[1]]
        chosen = _pick([o for o in options if o not in used] or options, rng)
        used.add(chosen)
        return _expand(chosen, rng, used)

    return _SLOT.sub(option, text)


def _one(style: str, rng: Random) -> str:
    text = _expand(f"{{{style}}}", rng, set())
    text = _A_BEFORE_VOWEL.sub(r"\1n ", text)
    # Letter case as people write it: mostly lower, some sentences with a capital and a full stop.
    draw = rng.random()
    if style == "title":
        return _title_case(text, small_words=draw < 0.5)
    if draw < 0.7:
        return text
    capitalised = text[:1].upper() + text[1:]
    return f"{capitalised}." if style in ("sentence", "long") and draw > 0.85 else capitalised


def _title_case(text: str, small_words: bool) -> str:
    """'the edge of a lake' as 'The Edge of a Lake', or as 'The Edge Of A Lake' without small words."""
    words = text.split()
    return " ".join(
        word if small_words and number and word in _SMALL_WORDS else word[:1].upper() + word[1:]
        for number, word in enumerate(words)
    )
