"""What the reader's pages say: words, names, amounts, dates, and strings that mean nothing.

Every function takes the page's random.Random and returns a text.
"""
import random
import string

COMMON = """the of and to in is for on that with as it be at by this have from or an are was not you
which can has will all their if more when one about may other were your been who these some what
would into its there do also such than time only two any new between no first after most those
them each then made through where must over should before even many because well here under same
both while last against much during since another how being long still general part does good work
form order point place use state small large number great case high right set own given public
early group way level water house report service system made country program question during
without again however within think world government company school course found system business
life fact hand problem money water power change interest night real best market home book page line
letter paper month week year today tomorrow monday tuesday wednesday thursday friday saturday sunday
account address agreement amount annual apply approved attached balance bank batch board branch
building cancel card cash charge check city client close code collect comment complete condition
confirm contact contract copy cost credit current customer daily data date deal delivery department
deposit description desk detail discount document draft due email employee energy engine equipment
error estimate event example expense export factory fee field file final finance fixed flight floor
freight garden gate glass goods green gross guest guide half handle health heating history holiday
hotel hour identity import income index information insurance invoice issue item job journal journey
key kitchen label labour land language lease ledger legal length library licence light limit list
loan local location machine mail main manager manual map material matter measure medical meeting
member message method middle minute mobile model monthly motor move museum name nature network note
notice nurse object offer office officer online open operation option origin owner package paid
panel park partner party passenger password patient pattern payment pension people per period permit
person phone photo plan plant plastic please policy position post pound practice premium present
pressure price print private process product profit project property purchase quality quantity
quarter quick quote rail range rate reading ready reason receipt receive record red reference refund
region register regular remark remove renewal rent repair reply request research reserve result
return review river road room route rule safety salary sale sample save schedule science screen
search season seat second section security select send senior series settings share sheet ship shop
sign signature single site size skill social solution source space special speed staff stage stamp
standard start station status stock storage store street student subject submit subtotal summary
supply support surface survey table tax team technical telephone term terms test text thank ticket
title tool total tour town track trade traffic train transfer transport travel type unit update
urgent user vacant valid value vehicle version video view visit volume voucher wage wait wall
warning warranty waste weather website weight welcome window winter wood yellow zone quiet jump
lazy fox brown dog vexed wizard jury quartz sphinx black judge vow extra exact major join zero
""".split()

GOODS = """coffee tea milk bread butter cheese apples bananas oranges rice pasta sugar salt pepper
chicken soup salad sandwich pizza burger cake cookies juice water beer wine eggs yogurt honey jam
notebook pencil stapler envelope folder marker toner cable adapter keyboard mouse monitor headset
charger battery lamp chair desk shelf screws nails hammer drill paint brush gloves towel soap
shampoo toothpaste tissue blanket pillow shirt socks jacket shoes scarf hat ticket parking fuel
delivery repair consulting hosting licence training maintenance cleaning installation printing
""".split()

FIRST = """James Mary Robert Linda John Anna David Susan Peter Karen Thomas Nancy Daniel Laura Paul
Emma Mark Julia George Alice Kevin Sarah Brian Helen Edward Diana Frank Grace Henry Olivia Jack
Sophie Oscar Maria Victor Elena Hugo Clara Felix Nina Samuel Ruth Walter Ingrid Ahmed Fatima Wei
Yuki Carlos Lucia Ivan Olga Pierre Amelie Jonas Freya Liam Zoe Noah Ada Quentin Xavier Kofi Priya
""".split()

LAST = """Smith Johnson Brown Taylor Miller Wilson Moore Clark Lewis Walker Hall Young King Wright
Hill Scott Green Adams Baker Carter Mitchell Parker Evans Turner Collins Stewart Morris Murphy Cook
Rogers Reed Bailey Cooper Kelly Howard Ward Cox Diaz Wood Watson Brooks Bennett Gray Hughes Price
Myers Long Foster Sanders Ross Powell Fisher Ellis Ford Graham West Lawrence Jordan Owens Hunter
Fernandez Rossi Schmidt Weber Novak Larsen Dubois Tanaka Chen Singh Okafor Haddad Kowalski Quinn
""".split()

PLACES = """London Paris Berlin Madrid Rome Vienna Oslo Dublin Lisbon Prague Boston Chicago Denver
Austin Seattle Portland Houston Phoenix Atlanta Toronto Sydney Auckland Leeds York Bath Oxford
Bristol Glasgow Cardiff Zurich Geneva Munich Hamburg Lyon Turin Porto Ghent Utrecht Aarhus Bergen
Springfield Riverside Franklin Clinton Georgetown Salem Fairview Madison Newport Jackson Quebec
""".split()

STREETS = """Main Oak Pine Maple Cedar Elm Lake Hill Park Church Mill Station Bridge King Queen
Victoria Market Spring River Garden North South East West High Highland Willow Sunset Valley Abbey
""".split()

ROADS = ["Street", "Road", "Avenue", "Lane", "St.", "Rd.", "Ave", "Drive", "Square", "Way", "Blvd"]
FIRMS = ["Ltd", "Inc.", "GmbH", "LLC", "& Sons", "Group", "Co.", "Partners", "Services", "Supplies"]
MONTHS = """January February March April May June July August September October November
December""".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

ONSETS = """b c d f g h j k l m n p qu r s t v w x y z bl br ch cl cr dr fl gr pl sh sl st th tr
""".split()
VOWELS = "a e i o u a e i o ai ea ee oo ou ie y".split()
CODAS = "b ck d ff g l m n p r s t x nd nt rt st ng ll ss zz".split() + [""] * 8
ACCENTED = "é è ê à ç ü ö ä ß ñ".split()


def code(rng: random.Random, low: int = 4, high: int = 10) -> str:
    """A reference number: capitals, digits, hyphens."""
    marks = string.ascii_uppercase + 2 * string.digits + "--/."
    text = "".join(rng.choices(marks, k=rng.randint(low, high)))
    return text.strip("-/.") or str(rng.randint(10, 999))


def noise(rng: random.Random) -> str:
    """Any characters: what nobody can guess."""
    kind = rng.random()
    marks = (string.ascii_letters if kind < 0.3 else string.digits if kind < 0.4 else
             string.ascii_letters + string.digits if kind < 0.6 else
             string.ascii_letters + string.digits + string.punctuation if kind < 0.9 else
             string.punctuation + string.digits + "£€–—‘’“”•·°©×")
    return "".join(rng.choices(marks, k=rng.randint(1, 8)))


def invented(rng: random.Random) -> str:
    """A word that could be one."""
    return "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)
                   for _ in range(rng.choice([1, 1, 2, 2, 3])))


def word(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.6:
        return rng.choice(COMMON)
    if kind < 0.92:
        return invented(rng)
    if kind < 0.96:
        return rng.choice(FIRST + LAST + PLACES)
    text = invented(rng)
    at = rng.randrange(len(text))
    return text[:at] + rng.choice(ACCENTED) + text[at + 1:]


def sentence(rng: random.Random, low: int = 3, high: int = 12) -> str:
    """Words with the punctuation of prose; here and there a number, or what means nothing."""
    words = []
    for _ in range(rng.randint(low, high)):
        kind = rng.random()
        text = word(rng) if kind < 0.9 else noise(rng) if kind < 0.94 else str(rng.randint(0, 2100))
        text = (f"“{text}”" if kind < 0.01 else f"({text})" if kind < 0.02 else f'"{text}"'
                if kind < 0.03 else f"{text}’s" if kind < 0.035 else f"{text}'s" if kind < 0.04
                else f"{text} –" if kind < 0.045 else f"{text} -" if kind < 0.05 else text)
        words.append(text + rng.choice(",;:,") if rng.random() < 0.12 else text)
    words[0] = upper(words[0][:1]) + words[0][1:]
    return " ".join(words).rstrip(",;:– -") + rng.choice("......?!")


def title(rng: random.Random, low: int = 1, high: int = 4) -> str:
    words = [word(rng) for _ in range(rng.randint(low, high))]
    text = " ".join(upper(w[:1]) + w[1:] for w in words)
    return upper(text) if rng.random() < 0.4 else text


def upper(text: str) -> str:
    """In capitals, but for letters with accents: a page has only small ones."""
    return "".join(c.upper() if c.isascii() else c for c in text)


def person(rng: random.Random) -> str:
    name = f"{rng.choice(FIRST)} {rng.choice(LAST)}"
    kind = rng.random()
    if kind < 0.1:
        return f"{rng.choice(['Mr', 'Ms', 'Dr', 'Mrs.', 'Prof.'])} {name}"
    if kind < 0.2:
        return name.replace(" ", f" {rng.choice(string.ascii_uppercase)}. ")
    return name if kind < 0.85 else f"{invented(rng).title()} {invented(rng).title()}"


def company(rng: random.Random) -> str:
    name = rng.choice(LAST + PLACES) if rng.random() < 0.5 else invented(rng).title()
    if rng.random() < 0.4:
        name += " " + rng.choice(COMMON).title()
    return f"{name} {rng.choice(FIRMS)}"


def street(rng: random.Random) -> str:
    return f"{rng.randint(1, 999)} {rng.choice(STREETS)} {rng.choice(ROADS)}"


def town(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.4:
        state = "".join(rng.choices(string.ascii_uppercase, k=2))
        return f"{rng.choice(PLACES)}, {state} {rng.randint(10000, 99999)}"
    if kind < 0.7:
        return f"{rng.choice(PLACES)} {code(rng, 3, 4)} {code(rng, 3, 3)}"
    return f"{rng.randint(1000, 99999)} {rng.choice(PLACES)}"


def amount(rng: random.Random, most: int = 5000) -> float:
    return rng.randint(1, 10 ** rng.randint(3, len(str(most * 100)))) / 100


def money(rng: random.Random, value: float | None = None, sign: str | None = None) -> str:
    """An amount as a page writes it."""
    value = amount(rng) if value is None else value
    sign = rng.choice(["", "", "$", "$", "£", "€", "EUR ", "USD "]) if sign is None else sign
    return f"{sign}{value:,.2f}"


def date(rng: random.Random) -> str:
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1995, 2030)
    name = MONTHS[month - 1]
    return rng.choice([f"{day:02}/{month:02}/{year}", f"{year}-{month:02}-{day:02}",
                       f"{day}.{month}.{year}", f"{name} {day}, {year}", f"{day} {name} {year}",
                       f"{day} {name[:3]} {year}", f"{day:02}-{name[:3]}-{year % 100:02}",
                       f"{month}/{day}/{year % 100:02}", f"{rng.choice(DAYS)}, {day} {name}"])


def clock(rng: random.Random) -> str:
    hour, minute = rng.randint(0, 23), rng.randint(0, 59)
    return rng.choice([f"{hour:02}:{minute:02}", f"{hour % 12 + 1}:{minute:02} "
                       f"{rng.choice(['am', 'pm', 'AM', 'PM'])}", f"{hour:02}:{minute:02}:59"])


def phone(rng: random.Random) -> str:
    a, b, c = rng.randint(100, 999), rng.randint(100, 999), rng.randint(1000, 9999)
    return rng.choice([f"({a}) {b}-{c}", f"+{a % 90 + 1} {a} {b} {c}", f"{a}-{b}-{c}",
                       f"0{a} {b}{c}", f"{a}.{b}.{c}"])


def email(rng: random.Random) -> str:
    name = rng.choice([rng.choice(FIRST).lower(), invented(rng), rng.choice(COMMON)])
    tail = rng.choice(["", f".{rng.choice(LAST).lower()}", str(rng.randint(1, 99)),
                       "_" + rng.choice(COMMON)])
    return f"{name}{tail}@{invented(rng)}.{rng.choice(['com', 'org', 'net', 'co.uk', 'de', 'io'])}"


def link(rng: random.Random) -> str:
    head = rng.choice(["https://", "http://", "www.", ""])
    tail = rng.choice(["", f"/{invented(rng)}", f"?id={rng.randint(1, 9999)}",
                       f"-{rng.randint(1, 99)}.html"])
    return f"{head}{invented(rng)}.{rng.choice(['com', 'org', 'net', 'io'])}/{word(rng)}{tail}"


FIELDS = """
Name|Date|Address|City|Phone|Email|Account|Reference|Order|Customer|Total|Subtotal|Tax|VAT|Due
Balance|Amount|Price|Qty|Discount|Shipping|Status|Type|Invoice No.|PO #|Serial|Model|Room|Seat
Flight|Gate|Class|Weight|Height|Width|Code|Policy|Department|Title|Issued|Expires|Born|Signed
Paid
""".replace("\n", "|").strip("|").split("|")


def anything(rng: random.Random) -> str:
    """A short line of any kind."""
    kind = rng.random()
    if kind < 0.28:
        return sentence(rng, 2, 9)
    if kind < 0.40:
        return " ".join(noise(rng) for _ in range(rng.randint(1, 4)))
    if kind < 0.50:
        return f"{rng.choice(FIELDS)}{rng.choice([':', ' ', ': ', ' - '])}{some_value(rng)}"
    if kind < 0.58:
        return title(rng)
    if kind < 0.64:
        return " ".join(code(rng, 1, 9) for _ in range(rng.randint(1, 3)))
    if kind < 0.70:
        return " ".join(invented(rng) for _ in range(rng.randint(1, 5)))
    return some_value(rng)


def some_value(rng: random.Random) -> str:
    """What may stand behind a label."""
    return rng.choice([person, company, street, town, money, money, date, date, clock, phone, email,
                       link, code, code, noise, lambda r: str(r.randint(0, 10 ** r.randint(1, 6))),
                       lambda r: f"{r.randint(0, 100)}{r.choice(['%', ' %', ' kg', ' x', '°C'])}",
                       lambda r: r.choice(GOODS)])(rng)
