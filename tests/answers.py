r"""Pairs of answers by family, as plain data: `a <=> b` earn each other's reward, `a <!> b` do not, either way round.

`gold => answer` and `gold !> answer` are read one way alone. An answer stands in a box, and the gold alone.
"""

ANSWERS = {
    "numbers": r"""
        1000 <=> 1,000
        1000 <=> 1 000
        1000 <=> 1 000
        1000 <=> 1 000
        1000 <=> 1 000
        1000 <=> 1\,000
        1000 <=> 1\;000
        1000 <=> 1\ 000
        1000 <=> 1{,}000
        1000 <=> 1,\!000
        1000 <=> 1~000
        1000000 <=> 1'000'000
        1000000 <=> 1 000 000
        1000000 <=> 10,00,000
        1000000 <=> 1.000.000
        -3 <=> –3
        12345.5 <=> 12 345.5
        5 <=> 5.0
        5 <=> +5
        0.5 <=> .5
        -5 <=> −5
        18 <=> １８
        18 <=> ١٨
        1000.99 <=> 1000,99
        3.14 <=> 3,14
        0.5 <=> 0,5
        42 <=> 42.
        42 <=> $42$
        42 <=> \(42\)
        42 <=> **42**
        2.5 <!> 2,500
        1000 <!> 1 00
        1000 <!> 1
        1000 <!> 0
        1 2 3 <!> 6
        1 2 3 <!> 123
        2 3 <!> 6
        1,2 <!> 1.2
        1,2 <!> 12
        5 <!> -5
        5 <!> 5!
        5 <!> 5^2
        0.3 <!> 0.30001
        0110 !> 110
        007 !> 7
        -073 !> -73
        073 !> 73.0
        5 <!> less than 5
        5 <!> more than 5
        5 <!> at least 5
        5 <!> 5 at most
        5 <!> 5 or more
        5 <!> 5 below zero
        5 <!> 5 degrees below zero
        5 <!> double 5
        5 <!> twice 5
        5 <!> half of 5
        5 <!> a multiple of 5
        5 <!> the square of 5
        5 <!> all but 5
        5 <!> not 5
        5 <!> 5 factorial
        5 <!> 5 less than 10
        5 <!> 5 years ago
        5 <!> 5 short
        5 <!> under 5
        5 <!> 5 thousand
        5 <!> 5 less
        5 <!> 5 fewer
        5 <!> 5 grand
        5 <!> 5 lakhs
        5 <!> 5 ppm
        5 <!> 5万
        5 => exactly 5
        5 => the answer is 5
        5 => It is 5 apples.
        5 => Price: 5
        5 <!> 5 twelfths
        5 <!> 5 octillion
        5 <!> 5\text{th}
        5 => 5\text{ paths}
        """,
    "units": r"""
        18 <=> 18元
        18 <=> 18개
        18 <=> 18円
        18 <=> 18 個
        18 <=> 18人
        18 <=> 18 दिन
        18 <=> 18 วัน
        18 <=> 18 штук
        30 <=> 30 m²
        30 => 30m²
        30\text{ m}^2 <=> 30 m²
        90 <=> 90°
        90^\circ <=> 90°
        25^\circ C <=> 25℃
        18\text{ km} <=> 18 kilometers
        \frac{1}{3}\textbf{ meters} <=> \frac13
        3 1/2 cups <=> 3.5
        18元 <!> 18円
        18개 <!> 18명
        18 km <!> 18 cm
        30 m² <!> 30 m³
        25℃ <!> 25℉
        5 kg <!> 5 g
        5 hours <!> 5 minutes
        5 km <!> 5 km²
        5 m <!> 5 mi
        5 light years <!> 5 years
        5 nautical miles <!> 5 miles
        3 troy ounces <!> 3 ounces
        3 man-hours <!> 3 hours
        5 \mu\text{m} <=> 5 µm
        5\,\mu m <!> 5 mm
        3\ \mathrm{k}\Omega <=> 3000 ohms
        3\ \mathrm{M}\Omega <!> 3\ \mathrm{m}\Omega
        2\mu N <!> 2
        3\,\frac{\mathrm{m}}{\mathrm{s}^2} <=> 3 m/s^2
        3 \frac{\text{m}}{\text{s}} <!> 3 \frac{\text{s}}{\text{m}}
        F = 10 N <=> 10 N
        90° <=> \pi/2
        \theta = 45^\circ <=> \frac{\pi}{4} rad
        90° <!> \pi
        60 radians <!> 60 degrees
        45^\circ 30' <=> 45.5°
        45^\circ 30' <!> 45.3°
        \angle ABC = 45^\circ <=> 45
        5\sqrt{2}\text{ m} <=> 500\sqrt{2}\text{ cm}
        5\sqrt{2}\text{ m} <!> 50\sqrt{2}\text{ cm}
        5 children <=> 5 child
        5 boxes <=> 5 box
        12 cc <=> 12 mL
        5 Stunden <=> 300 minutes
        5千克 <=> 5000 grams
        5 小时 <!> 5 分钟
        5 inches <=> 5"
        5 ft <!> 5"
        F = 10 N <!> 10 J
        v_0 = 5 m/s <=> 5 m/s
        """,
    "currencies": r"""
        18 <=> $18
        18 <=> \$18
        18 <=> 18\$
        18 <=> US$18
        18 <=> €18
        18 <=> 18€
        18 <=> £18
        18 <=> ¥18
        18 <=> ￥18
        18 <=> ₩18
        18 <=> 18₫
        18 <=> ₦18
        18 <=> ฿18
        18 <=> 18 ₴
        18 <=> \pounds 18
        18 <=> 18 USD
        18 <=> 18 kr
        18 <=> Rs. 18
        18 <=> \text{€}18
        18 <=> EUR 18
        €18 <=> 18 euros
        €18 <=> EUR 18
        ₩1,000 <=> 1000원
        $18 <=> 18 dollars
        -$5 <=> -5
        \$3.50 <=> 3.5
        $18 <!> €18
        ₩18 <!> €18
        ¥18 <=> 18元
        ¥18 <=> 18円
        18 yuan <!> 18 yen
        $25 <!> 25 Canadian dollars
        25 dollars <!> 25 Hong Kong dollars
        A$25 <!> C$25
        25 CAD <=> 25 Canadian dollars
        25 Swiss francs <=> CHF 25
        25 Mexican pesos <!> 25 Chilean pesos
        €0.25 <=> 25 cents
        £0.25 <=> 25 pence
        $5 an hour <=> $5/hour
        $5 an hour <!> $5 per day
        ₹18 <!> ₦18
        $18 <!> 18 cents
        $18 <!> $18 million
        $3 per kg <!> $3 per lb
        $3 per day <=> $3
        """,
    "percent": r"""
        12.5\% <=> 12.5
        12.5\% <=> 12.5%
        12.5\% <=> 12.5 %
        12.5\% <=> 12.5 percent
        12.5\% <=> 12.5\text{ percent}
        12.5\% <=> 12.5 pct
        12.5% <=> 12.5％
        50\% <=> \frac{1}{2}
        50\% <=> 0.5
        50% <=> 1/2
        12,5 % <=> 12.5%
        40 Prozent <=> 40\%
        50\% <=> 50
        25\% \text{ off} <=> 25\%
        12.5\% <!> 1.25\%
        12.5\% <!> \frac{1}{4}
        50% <!> 5
        50% <!> 0.05
        12\% <!> 12 dollars
        12\% <!> 12 cm
        """,
    "fractions": r"""
        \frac{1}{2} <=> 1/2
        \frac{1}{2} <=> 0.5
        \frac{1}{2} <=> ½
        \frac{1}{2} <=> \frac12
        \frac{1}{2} <=> \dfrac{2}{4}
        \frac{1}{2} <=> 1⁄2
        \frac{7}{8} <=> ⁷⁄₈
        \frac{1}{3} <=> ⅓
        \frac{1}{3} <=> 0.3333333333
        -\frac{1}{2} <=> \frac{-1}{2}
        -\frac{1}{2} <=> -1/2
        -\frac{1}{2} <=> \frac{1}{-2}
        \frac{10}{9} <=> 10/9
        \\frac{1}{2} <=> \frac{1}{2}
        \frac{1}{2} <!> \frac{2}{1}
        \frac{1}{2} <!> 2
        \frac{1}{2} <!> 12
        ½ <!> 2
        ½ <!> 1
        ⅓ <!> 0.3
        \frac{1}{3} <!> 0.333
        \frac{1}{2} <!> -\frac{1}{2}
        \frac{1}{0} <!> 0
        """,
    "mixed numbers": r"""
        3 1/2 <=> 7/2
        3 1/2 <=> 3.5
        3 1/2 <=> 3½
        3 1/2 <=> 3\frac{1}{2}
        3 1/2 <=> 3 \frac12
        3 1/2 <=> 3\,\frac{1}{2}
        -3 1/2 <=> -3.5
        -3\frac{1}{2} <=> -\frac{7}{2}
        x = 3 1/2 <=> 3.5
        2 3/4 <!> 1.5
        2\frac{3}{4} <!> \frac{3}{2}
        3½ <!> 3
        3 1/2 <!> 31/2
        -3 1/2 <!> -2.5
        """,
    "scientific": r"""
        1.5e3 <=> 1500
        1.5E3 <=> 1500
        1.5e+3 <=> 1500
        1e-05 <=> 0.00001
        1.5 \times 10^3 <=> 1500
        1.5 \times 10^{3} <=> 1.5e3
        1.5 x 10^3 <=> 1500
        1.5×10³ <=> 1500
        1.5 \cdot 10^{-3} <=> 0.0015
        1.5*10^3 <=> 1500
        6.02e23 <=> 6.02 \times 10^{23}
        10⁻³ <=> 0.001
        1.5e3 <!> 1.5
        1.5e3 <!> 15003
        1.5 \times 10^3 <!> 1.5
        1.5 \times 10^3 <!> 15 \times 10^3
        1.5 x 10^3 <!> 1.5
        1.5 \times 10^3 <!> 1.5 \times 10^{-3}
        10⁻³ <!> 10^3
        10² <!> 102
        """,
    "repeating": r"""
        0.\overline{3} <=> \frac{1}{3}
        0.\overline{3} <=> 1/3
        0.\bar{3} <=> \frac13
        0.(3) <=> 1/3
        0.\dot{3} <=> 1/3
        0.3̅ <=> 1/3
        0.333... <=> 1/3
        0.333… <=> \frac{1}{3}
        0.333\ldots <=> \frac{1}{3}
        0.1\overline{6} <=> 1/6
        0.1(6) <=> 0.1666...
        0.\overline{142857} <=> 1/7
        0.\dot{1}4285\dot{7} <=> 1/7
        1.\overline{09} <=> \frac{12}{11}
        0.\overline{3} <=> 0.\overline{33}
        0.\overline{9} <=> 1
        .\overline{3} <=> 1/3
        33.\overline{3}\% <=> 1/3
        0.\overline{3} <!> 0.3
        0.\overline{3} <!> 3
        0.\overline{3} <!> 0.0\overline{3}
        0.\bar{3} <!> 0.33
        0.(3) <!> 0.3
        0.333... <!> 0.333
        0.1\overline{6} <!> 0.\overline{16}
        """,
    "sets": r"""
        \{1,2\} <=> \{2,1\}
        \{1,2\} <=> 1, 2
        \{1,2\} <=> \lbrace 1, 2 \rbrace
        \left\{1,\frac12\right\} <=> \{0.5,1\}
        \{1,1,2\} <=> \{1,2\}
        1, 2, 2 <!> 1, 1, 2
        \emptyset <!> \{\emptyset\}
        1, 2 <=> 2, 1
        1, 2 <=> 1 and 2
        1, 2 <=> 1 \text{ or } 2
        1, 2, 3 <=> 3, 2, and 1
        1, 2 <=> x = 1, 2
        1, 2 <=> x=1, x=2
        \pm 2 <=> -2, 2
        ±2 <=> \pm 2
        x = \pm 2 <=> \{-2, 2\}
        1 \pm \sqrt{3} <=> 1+\sqrt3, 1-\sqrt3
        \emptyset <=> \varnothing
        \emptyset <=> \{\}
        \emptyset <=> ∅
        \{x \mid x > 1\} <=> (1, \infty)
        \{x | x > 1\} <=> x > 1
        \{x : x > 1\} <=> x > 1
        \{x \in \mathbb{R} : 1 < x < 2\} <=> (1,2)
        \{x : x > 1\} <!> \{x : x < 1\}
        \{x | x > 1\} <!> x < 1
        \{x | x > 1\} <!> x \ge 1
        \{n \in \mathbb{Z} : n > 1\} <!> (1, \infty)
        \{1,2\} <!> (1,2)
        \{1,2\} <!> [1,2]
        \{1,2\} <!> \{1,3\}
        1, 2 <!> 1
        1, 2 <!> 1, 3
        1, 1, 2 <!> 1, 2
        \pm 2 <!> 2
        \emptyset <!> 0
        \emptyset <!> \{0\}
        \{1, 2, \{3\}\} <!> \{1, 2, 3\}
        \{3\} <=> 3
        1, 2, 3, ... <!> 1, 2, 3
        """,
    "intervals": r"""
        (1, \infty) <=> (1,∞)
        (1, \infty) <=> x > 1
        [1, \infty) <=> x \ge 1
        [1,∞) <=> x ≥ 1
        (-\infty, 2] <=> (−∞, 2]
        (-\infty, 2] <=> x \in (-\infty, 2]
        (0, 1) <=> ]0, 1[
        [0, 1] <=> [0; 1]
        (1, 2) <=> 1 < x < 2
        [1, 2) <=> x \in [1, 2)
        x \in [1,2) <=> 1 \le x < 2
        (0.5, 1] <=> (\frac12, 1]
        (-\infty, 1) \cup (2, \infty) <=> x<1 \text{ or } x>2
        (-\infty, 1) \cup (2, \infty) <=> x < 1, x > 2
        (-\infty, 2) \cup (2, \infty) <=> x \neq 2
        (-\infty, 2) \cup (2, \infty) <=> \mathbb{R} \setminus \{2\}
        [0,1] \cup [2,3] <=> [2,3] \cup [0,1]
        (1,2) <!> [1,2]
        (1,2) <!> (2,1)
        (1,2) <!> (1,3)
        (3,1) <!> (2,1)
        (1, \infty) <!> [1, \infty)
        (1, \infty) <!> x < 1
        (1, \infty) <!> 1
        -[0,1) <!> 1
        (-\infty, 1) \cup (2, \infty) <!> (-\infty, 1)
        (-\infty, 1) \cup (2, \infty) <!> 1 < x < 2
        [0,1) <!> [0,9)
        """,
    "inequalities": r"""
        x > 1 <=> 1 < x
        x \geq 5 <=> x >= 5
        x \geq 5 <=> 5 \leq x
        x ≤ 5 <=> x \le 5
        x < 1 <=> -x > -1
        |x| < 2 <=> -2 < x < 2
        x \ge 3 <=> x is at least 3
        y \ge 3 <=> at least 3
        x < \frac12 <=> x is less than \frac{1}{2}
        x \ge 3 <!> x is at most 3
        x \ge 3 <!> x is greater than 3
        at least 3 <!> 3
        at least 3 apples <!> at most 3 apples
        < 5 <=> less than 5
        x =< 3 <=> x \le 3
        x<1 \text{ or } x>2 <=> x > 2 or x < 1
        x > 1 \text{ and } x < 2 <=> 1 < x < 2
        x \ne 3 <=> x != 3
        x > 1 <!> x < 1
        x > 1 <!> x \ge 1
        x > 1 <!> y > 1
        x > 1 <!> x > 2
        x > 5 !> 5
        5 !> x > 5
        3 !> x>=3
        3 !> x <= 3
        3 !> x != 3
        3 !> So x >= 3
        3.5 !> x ≥ 3.5
        1 < x < 2 <!> 1 < x < 3
        1 < x < 2 <!> 1 \le x \le 2
        x<1 or x>2 <!> x<1 and x>2
        x<1 or x>2 <!> y<1 or y>2
        x>1 or y>2 <!> x>1 and y>2
        x>1 and y>2 <=> y > 2, x > 1
        x>1 or y>2 <=> x>1 \lor y>2
        x<3 and x>1 <!> x<3 \lor x>1
        p \lor q <!> p \land q
        p \lor q <!> p, q
        p \lor q <=> q ∨ p
        \neg p \lor q <!> \neg p \land q
        (p \lor q) \land r <!> (p \land q) \land r
        p \lor q \land r <!> p \land q \lor r
        x=1 \lor x=2 <!> x=1 \land x=2
        x=1 \lor x=2 <=> 1, 2
        """,
    "matrices": r"""
        \begin{pmatrix}1\\2\end{pmatrix} <=> \begin{bmatrix}1\\2\end{bmatrix}
        \begin{pmatrix}1 & 0 \\ 0 & 1\end{pmatrix} <=> \begin{pmatrix}1&0\\0&1\end{pmatrix}
        \begin{pmatrix}\frac12\\2\end{pmatrix} <=> \begin{pmatrix}0.5\\2\end{pmatrix}
        \begin{pmatrix}1\\2\end{pmatrix} <!> \begin{pmatrix}2\\1\end{pmatrix}
        \begin{pmatrix}1&2\end{pmatrix} <!> \begin{pmatrix}1\\2\end{pmatrix}
        \begin{pmatrix}1&2\\3&4\end{pmatrix} <!> \begin{pmatrix}1&3\\2&4\end{pmatrix}
        """,
    "tuples": r"""
        (1, 2) <=> (1,2)
        (1, 2) <=> 1, 2
        (1, 2) <=> (x, y) = (1, 2)
        (1, 2) <=> x = 1, y = 2
        (1, 2) <=> \langle 1, 2 \rangle
        x = 1, y = 2 <=> y = 2, x = 1
        (1, \frac{9}{2}) <=> (1, 4.5)
        (1, 2, 3) <=> \left(1, 2, 3\right)
        (1, 2), (3, 4) <=> (3, 4), (1, 2)
        (1,2), (3,4) <=> x = 1, y = 2; x = 3, y = 4
        (x, y) = (5, 8) and (8, 5) <=> (5, 8), (8, 5)
        (1, 2) <!> (2, 1)
        (1, 2) <!> \{1, 2\}
        (1, 2, 3) <!> (1, 3, 2)
        (1, 2) <!> 3
        x = 1, y = 2 <!> x = 2, y = 1
        x = 1, y = 2 <!> (2, 1)
        (1, 2), (3, 4) <!> (1, 3), (2, 4)
        D = (0, 1) <!> E = (0, 1)
        y = 1, x = 2 <=> (2, 1)
        P(3,-4) <=> (3, -4)
        P(3,-4) <!> (-4, 3)
        x = 1, y = 2 <=> \begin{cases} x = 1 \\ y = 2 \end{cases}
        y = 1, x = 2 <!> (1, 2)
        m = 2, b = 3 <=> (2, 3)
        """,
    "expressions": r"""
        \sqrt{2} <=> √2
        2\sqrt{3} <=> 2√3
        2\sqrt2 <=> √(8)
        2 <=> ∛8
        x^2 <=> x²
        x^{2}+1 <=> x²+1
        x_1 <=> x₁
        2\pi <=> 2π
        \theta <=> θ
        2×3 => 6
        3.5 <=> 7÷2
        \infty <=> ∞
        -\infty <=> -∞
        2x+1 <=> 1+2x
        (x+1)^2 <=> x^2+2x+1
        3+2i <=> 2i+3
        1 - \frac{1}{e} <=> 1 - e^{-1}
        10 <=> \binom{5}{2}
        x² <!> x2
        x² <!> 2x
        √2 <!> 2
        2√3 <!> 23
        ∛8 <!> √8
        ∛8 <!> 8
        xyz <!> zxy
        x+1 <!> x-1
        i <!> -i
        1 - \frac{1}{e} <!> 1 + \frac{1}{e}
        x_1 <!> x_2
        \frac{1+\sqrt{5}}{2} <!> 2
        f(x) <!> f(y)
        -1 <=> i^2
        e^{i\pi} <=> -1
        1 + \sqrt{3}i <=> 2(\cos 60^\circ + i\sin 60^\circ)
        \frac{1}{i} <=> -i
        z = 3 + 4i <=> 4i + 3
        3\hat{i} + 4\hat{j} <=> 3i + 4j
        3 \pmod{7} <=> 3 mod 7
        3 \pmod{7} <!> 3 (mod 5)
        2k\pi <=> 2\pi k, k \in \mathbb{Z}
        square root of 2 <=> \sqrt{2}
        x = \pm 2i <=> 2i, -2i
        I^2 R <!> -R
        \sin 30^\circ <=> \frac{1}{2}
        \sin 30^\circ <!> \sin 30
        \frac{\partial f}{\partial x} <!> \frac{\partial f}{\partial y}
        """,
    "left to do": r"""
        137 !> 88 + 49
        137 !> 88+49=88+49
        137 !> x = 88 + 49
        137 !> (88) + (49)
        137 !> \$88 + \$49
        137 !> 88 + 49 \text{ dollars}
        137 !> 200 - 63
        137 !> 68.5 \times 2
        137 !> 274/2
        137 !> \frac{274}{2}
        137 !> 274 \div 2
        137 !> 27.4/0.2
        -63 !> 137 - 200
        1,000 !> 500 + 500
        12 !> (3)(4)
        12 !> 3(4)
        0.5 !> 0.25 + 0.25
        137 => 137 = 88 + 49
        137 => 88 + 49 = 137
        137 => x = 137
        88 + 49 => 137
        88 + 49 => 49 + 88
        1024 => 2^{10}
        120 => 5!
        4 => \sqrt{16}
        3072 => 3 \cdot 2^{10}
        0.5 => 1/2
        1.5 => 1\frac{1}{2}
        -0.75 => -(3/4)
        0.75 => \left(\frac{3}{4}\right)
        7.5 !> (2.5)(3)
        7.5 => 15/2
        1/3 => 2/6
        """,
    "equations": r"""
        5 <=> x = 5
        5 => 2 + 3 = 5
        2x+1 <=> y=2x+1
        y=2x+1 <=> 2x-y+1=0
        y=2x+1 <=> y = 1+2x
        x^2-1=0 <=> x^2=1
        2x+4y-3=0 <=> y=-\frac{1}{2}x+\frac{3}{4}
        f(x)=x^2 <=> x^2
        \frac{1}{3} => x=\frac{1}{3} \approx 0.333
        x = 5 <!> y = 5
        x = 5 <!> x = -5
        y = x <!> y = 2x
        x^2 = 9 !> 9
        3 => f(3) = 3
        3 => AB = 3
        3 => x_1 = 3
        3 => \theta = 3
        3 => x = y = 3
        3 => \text{Total cost} = 3
        3 => The value of x = 3
        3 !> x+y=3
        3 !> xy=3
        3 !> -x=3
        3 !> x+y=2z=3
        3 => x~=~3
        3 !> 2x=3
        3 !> x²=3
        3 !> 1/x=3
        3 !> \frac{x}{y}=3
        3 !> \sqrt{x}=3
        3 !> |x|=3
        3 !> \log x = 3
        3 !> \sin x = 3
        3 !> So x+y = 3
        \frac12 !> x+y=\frac12
        x^2 = -1 <!> x^2 = -4
        1:2 <!> 2:1
        5 <!> 5 = 6
        """,
    "texts": r"""
        Paris <=> \text{Paris}
        Paris <=> paris
        no solution <=> \text{No solution}
        yes <=> Yes.
        the circle <=> circle
        2 remainder 3 <=> 2 R 3
        2 remainder 3 <!> 3 R 2
        DNE <=> does not exist
        1, 4, 9, \dots <=> 1, 4, 9, ...
        東京 <=> \text{東京}
        listen <!> silent
        Paris <!> Pairs
        yes <!> no
        true <!> false
        dog bites man <!> man bites dog
        AB <!> BA
        2 dogs and 3 cats <!> 3 dogs and 2 cats
        AZYUK2A <!> 2
        A' <!> A
        A'' <!> A'
        A'B'C' <!> ABC
        \angle A' <!> \angle A
        Paris <=> "Paris"
        Paris <=> 'Paris.'
        Paris <=> “Paris”
        10.0.0.1 <=> 10.0.0.1
        10.0.0.1 <!> 10.0.0.2
        192.168.1.10 <!> 192.168.1.100
        1.10.2 <!> 1.1.2
        2.0.1 <!> 2.1.0
        1.1.1 <!> 1.11
        """,
    "options": r"""
        A <=> (A)
        A <=> \text{(A)}
        A <=> \textbf{(A)}
        A <=> A.
        A <=> a
        A, C <=> A and C
        E <=> \text{E}
        A <!> B
        (A) <!> (B)
        A, C <!> A
        A, C <!> A, D
        ACD <!> ADC
        A, C <=> C, A
        A, C <=> AC
        A, C <=> A & C
        A, C <=> (A) and (C)
        B, D <=> BD
        A, C <=> both A and C
        A, C <=> (A)(C)
        B <=> B. Paris
        B <=> (B) Paris
        B <=> B) 12
        B. Paris <=> (B) paris
        B. Paris <!> C. Paris
        B. Paris <!> B. London
        B. Paris <!> Paris
        A, C <!> B. Paris
        A, C <!> AD
        A, C <!> A or C
        A, B, C <!> C, A, B
        CA <!> AC
        options B and C <=> B, C
        C <=> C: Berlin
        C <=> C - Berlin
        A <!> A. Paris and B. Rome
        (C) 42 <!> (C) 43
        A, B <!> A. Paris
        """,
    "dates": r"""
        2023-01-02 <=> 2023-01-02
        12:30 <=> 12:30
        7:30 am <=> 7:30 AM
        January 2, 2023 <=> january 2, 2023
        2023-01-02 <!> 2023-02-01
        2023-01-02 <!> 2020
        January 2 <!> January 3
        3/4/2021 <!> 4/3/2021
        12:30 <!> 2:05
        7:30 am <!> 7:30 pm
        1 BC <!> 1
        7:00 PM <=> 7 PM
        7:00 PM <=> 19:00
        7 PM <=> 19:00
        7 PM <=> 7 p.m.
        12 PM <=> noon
        12:00 AM <=> midnight
        12:30 AM <=> 00:30
        9 AM <=> 9 o'clock am
        10 to 3 <!> 10:03
        7 PM <!> 7 AM
        7 PM <!> 07:00
        7:00 PM <!> 7:30 PM
        19:00 <!> 7 AM
        Jan 2, 2023 <=> January 2, 2023
        Jan 2, 2023 <=> 2023-01-02
        2 January 2023 <=> 2023-01-02
        Monday, January 2, 2023 <=> 2nd of January 2023
        Sept. 3 <=> 3 September
        January 2 => January 2, 2023
        January 2, 2023 !> January 2
        29/02/2024 <=> 29 February 2024
        12/25/2023 <=> December 25, 2023
        1990 <!> 1990s
        Jan 2, 2023 <!> Feb 1, 2023
        Jan 2, 2023 <!> Jan 2, 2024
        Jan 2, 2023 <!> 2023-02-01
        2019-2020 <!> -1
        """,
    "prefixes and symbols": r"""
        5 MPa <!> 5 mPa
        5\text{ MPa} <!> 5\text{ mPa}
        5 MW <!> 5 mW
        5 Mb <!> 5 MB
        5 kB <!> 5 kb
        5 MB/s <!> 5 Mb/s
        5 Mbps <!> 5 MBps
        5 ms <!> 5 Ms
        5 mS <!> 5 ms
        5 mg <!> 5 Mg
        5 mm <!> 5 Mm
        5 K <!> 5 k
        5 µm <!> 5 mm
        0.5 M <!> 0.5 mM
        5 N <!> 5 J
        300 K <!> 300°C
        5 MW <=> 5 megawatts
        5 MW <=> 5000 kW
        5 µm <=> 5 micrometers
        5 um <=> 5 μm
        5 Mhz <=> 5 MHz
        5 KM <=> 5 km
        5 Kg <=> 5 kg
        5 N <=> 5
        5 N <=> 5 newtons
        5 J <=> 5 N m
        5 J <=> 5 N·m
        9.8 N/kg <=> 9.8 m/s²
        9.8 m/s^2 <=> 9.8 meters per second squared
        25 degrees C <=> 25^\circ\text{C}
        25 C <=> 25°C
        """,
    "amounts": r"""
        2h 30m <=> 2.5 hours
        2h30m <=> 150 minutes
        2.5 hours <=> 150 minutes
        2 hours and 30 minutes <=> 2.5 h
        1 hour 30 minutes <!> 90
        5 ft 10 in <=> 70 inches
        5'10" <=> 5 feet 10 inches
        3 lb 4 oz <=> 52 oz
        $1.50 <=> 150 cents
        150 cents <=> 150¢
        36 km/h <=> 10 m/s
        5 mL <=> 5 cm³
        1 GB <=> 1000 MB
        1 atm <=> 101325 Pa
        1 year <=> 12 months
        2h 30m <!> 2.3 hours
        2 hours 30 minutes <!> 230
        1 hour 30 minutes <!> 130 minutes
        5'10" <!> 5 feet 11 inches
        5 kg <!> 5000
        5 L <!> 5 mL
        5 lb <!> 5 pounds sterling
        £5 <!> 5 lb
        £5 <=> 5 pounds
        5 lb <=> 5 pounds
        50% <!> 50 cm
        50\% <!> 50 apples
        7 red balls <!> 7 blue balls
        7 red balls <=> 7 balls
        5 apples left <=> 5 apples
        1 day, 2 hours <=> 26 h
        5 m 30 cm <=> 5.3 m
        1m 30s <=> 90 s
        2 years 6 months <=> 2.5 years
        2 dollars and 50 cents <=> $2.50
        3 hours 90 minutes <!> 3 hours
        2 dollars 50 cents <!> $2.05
        1:30 <!> 1.5 hours
        3 kg of apples <!> 3 apples
        3 kg of apples <=> 3 kg
        3 boxes of books <!> 3 books
        """,
    "directions": r"""
        5 loss <!> 5 gain
        loss of 5 <!> gain of 5
        5 <!> 5 loss
        5 lower <!> 5 higher
        5 <!> 5 lower
        5 down <!> 5 up
        5% decrease <!> 5% increase
        5% <!> 5% decrease
        5 gross <!> 5 net
        5 before <!> 5 after
        5 days before <!> 5 days after
        5 minutes early <!> 5 minutes late
        5 miles north <!> 5 miles south
        5 years older <!> 5 years younger
        5 profit <!> 5 loss
        5 credit <!> 5 debit
        5 heads <!> 5 tails
        5 miles north <=> 5 miles
        5\% increase <=> 5%
        5 => loss = 5
        5 => The score is 5
        10 km east <!> 10 km west
        90° clockwise <!> 90° anticlockwise
        5 to the left <!> 5 to the right
        5 days late <!> 5 days early
        5 ahead <!> 5 behind
        30% more <!> 30% less
        5 <!> 5以上
        5 <!> 5 이하
        5 <!> 5 oder mehr
        5 <!> 5 o más
        5 <!> 5 или больше
        """,
    "magnitudes": r"""
        5 million <=> 5,000,000
        5 thousand <=> 5000
        2.5 billion <=> 2,500,000,000
        2.5\text{ billion dollars} <=> 2500000000
        $5 million <=> 5,000,000
        $5M <=> $5,000,000
        $2.5k <=> 2500
        1,200 thousand <=> 1.2 million
        2 dozen <=> 24
        2 dozen eggs <=> 24 eggs
        3 hundred <=> 300
        5万 <=> 50000
        5 crore <=> 50000000
        5 million <!> 5
        5 million <!> 5 billion
        5 dozen <!> 5
        5 score <!> 5
        5 pairs <!> 5
        5 couples <!> 5
        5 gross <!> 5
        5‰ <!> 5
        5 per mille <!> 5
        5 basis points <!> 5%
        5th <!> 5
        5-fold <!> 5
        -5 <=> negative 5
        -5 <=> minus 5
        5 <!> negative 5
        1 in 6 <=> \frac{1}{6}
        3 out of 5 <=> 3/5
        3 out of 5 <!> 3
        5 doz <!> 5
        half a million <!> 1/2
        2.5 thousand <!> 2.5 million
        3 trillion <=> 3 \times 10^{12}
        5 <!> 5 millones
        5 <!> 5 Mrd.
        5 <!> 5 тысяч
        5 <!> 5 लाख
        5 <!> 5 ألف
        5 <!> 5 ล้าน
        5 <!> 5 Dutzend
        5 Millionen <=> 5,000,000
        1,5 Millionen <=> 1.5 million
        1,5 million <!> 15 million
        1,500 million <=> 1.5 billion
        5 Mrd. <=> 5 billion
        5 Mrd. <!> 5 million
        5 тысяч <=> 5000
        5 ล้าน <=> 5,000,000
        2百万 <=> 2,000,000
        """,
    "typed formulas": r"""
        pi/2 <=> \frac{\pi}{2}
        2*pi <=> 2\pi
        2pi <=> 2π
        exp(2) <=> e^2
        exp(-x) <=> e^{-x}
        x**2 <=> x^2
        x ** 2 + 1 <=> x²+1
        2^(1/2) <=> \sqrt{2}
        x**(n+1) <=> x^{n+1}
        sqrt(2) <=> \sqrt{2}
        sqrt2 <=> √2
        sqrt(3)/2 <=> \frac{\sqrt{3}}{2}
        3*sqrt(5)/2 <=> \frac{3\sqrt{5}}{2}
        sqrt(1+sqrt(2)) <=> \sqrt{1+\sqrt{2}}
        cbrt(8) <=> 2
        abs(x) <=> |x|
        5 choose 2 <=> 10
        (-inf, 1) <=> (-\infty, 1)
        x == 3 <=> x = 3
        x := 3 <=> 3
        pi/2 <!> \pi
        exp(2) <!> 2e
        x**2 <!> 2x
        sqrt(2) <!> 2
        2^(1/2) <!> 1
        x =/= 3 <!> 3
        (pi/2, 3*pi/2) <=> (\frac{\pi}{2}, \frac{3\pi}{2})
        (1+sqrt(5))/2 <=> \frac{1+\sqrt{5}}{2}
        2^-3 <=> \frac{1}{8}
        x^-1 <=> \frac{1}{x}
        3*x**2*y <=> 3x^2y
        -inf <=> -\infty
        -x^2 <!> (-x)^2
        """,
    "lists, ratios and all numbers": r"""
        [1, 2, 3] <=> 1, 2, 3
        [1, 2, 3] <=> (1, 2, 3)
        [1, 2, 3] <!> [1, 3, 2]
        [1, 2, 3] <!> \{1, 2, 3\}
        [1, 2] <!> 1, 2
        [1, 2, 3] <!> 1, 2
        3 to 2 <=> 3:2
        3:2 <=> 6:4
        3/2 <=> 3:2
        2 to 3 to 4 <=> 2:3:4
        5:1 <!> 5
        1:5 <!> 5
        3:2 <!> 2:3
        3:2 <!> 1.5
        2:3:4 <!> 2:3:5
        A:B=1:2 => 1:2
        |AB|=1 => 1
        \frac{NO}{BO}=\frac12 => \frac12
        |x|=1 !> 1
        all real numbers <=> \mathbb{R}
        all real numbers <=> (-\infty, \infty)
        all reals <=> ℝ
        all real numbers <!> (0, \infty)
        all real numbers <!> \mathbb{Z}
        all real numbers <!> all integers
        no solution <=> \emptyset
        no solution <=> No solutions
        no solution <!> 0
        no solution <!> all real numbers
        {1, 2, 3} <=> 3, 2, 1
        {1, 2} <!> (1, 2)
        {} <=> \emptyset
        \{1\} \cup \{2, 3\} <=> \{3, 1, 2\}
        \{1, 2\} \cup \{2, 3\} <!> \{1, 2\}
        all real numbers except 0 <=> x \ne 0
        all real numbers except 0 <!> x \ne 1
        [[1, 2], [3, 4]] <=> \begin{pmatrix}1&2\\3&4\end{pmatrix}
        [[1, 2], [3, 4]] <!> \begin{pmatrix}1&3\\2&4\end{pmatrix}
        (-inf, 0) U (0, inf) <=> x \ne 0
        2 : 1 <=> 2-to-1
        1:2:3 <=> 2:4:6
        1:2:3 <!> 1:3:2
        all integers <=> \mathbb{Z}
        -\infty < x < \infty <=> \mathbb{R}
        all real numbers except 0 <!> \mathbb{R}
        all positive real numbers <!> \mathbb{R}
        """,
    "case": r"""
        AaBb <!> aabb
        AaBb <!> AABB
        Aa <!> aa
        HF <!> Hf
        CO <!> Co
        CO_2 <!> Co_2
        CS <!> Cs
        AaBb <=> \text{AaBb}
        NaCl <=> \mathrm{NaCl}
        no <=> NO
        McDonald <=> mcdonald
        paris <=> PARIS
        Ag <!> AG
        KCl <!> KCL
        RrYy <!> rryy
        DNA <!> RNA
        mRNA <=> mrna
        """,
    "science": r"""
        3.0 \times 10^8 m/s <=> 300,000 km/s
        1.6e-19 C <=> 1.6 \times 10^{-19} C
        6.63e-34 J s <=> 6.63 \times 10^{-34} \text{ J·s}
        10 kΩ <=> 10000 ohms
        1 kWh <=> 3.6 MJ
        500 nm <=> 5 \times 10^{-7} m
        2 A <=> 2 amps
        2.5 g/cm^3 <=> 2500 kg/m^3
        0.1 mol/L <=> 0.1 M
        98.6°F <=> 98.6 degrees Fahrenheit
        H2O <=> H_2O
        H2O <=> H₂O
        C6H12O6 <=> C_6H_{12}O_6
        pH = 7 <=> 7
        36 sq. ft <=> 36 ft^2
        12\pi \text{ cm}^2 <=> 12π cm²
        10 kΩ <!> 10 MΩ
        20 µF <!> 20 mF
        1.2 g/L <!> 1.2 mg/L
        50 N <!> 50 Pa
        H2O <!> H2O2
        Fe^{3+} <!> Fe^{2+}
        NaCl <!> NaOH
        12\pi \text{ cm}^2 <!> 12\pi \text{ m}^2
        36 sq ft <!> 36 ft
        60 rpm <!> 60 bpm
        2H_2 + O_2 \to 2H_2O <=> 2H_2 + O_2 \rightarrow 2H_2O
        \ce{H2O} <=> H_2O
        """,
    "money": r"""
        $2.5B <=> 2.5 billion dollars
        £3m <=> £3,000,000
        $0.05 <=> 5 cents
        €1.234,56 <=> €1234.56
        ($500) <=> -$500
        5% per year <=> 5%
        ($500) <!> $500
        $2.5B <!> $2.5M
        $0.05 <!> $5
        profit of $500 <!> loss of $500
        $1,234.56 <!> $1,234.65
        12 people <!> 12 dollars
        """,
    "code": r"""
        ['a', 'b'] <=> ["a", "b"]
        {'a': 1} <=> {"a": 1}
        "hello" <=> hello
        O(n log n) <=> O(n \log n)
        O(n^2) <=> O(n²)
        ln(x) <=> \ln x
        sin(x)^2 <=> \sin^2 x
        log_2(8) <=> 3
        1/(x+1) <=> \frac{1}{x+1}
        x^(-1) <=> \frac{1}{x}
        e^(2x) <=> e^{2x}
        ['a', 'b'] <!> ['b', 'a']
        {'a': 1} <!> {'a': 2}
        O(n) <!> O(n^2)
        e^2x <!> e^{2x}
        1/x+1 <!> \frac{1}{x+1}
        x += 1 <!> x -= 1
        a && b <!> a || b
        i++ <!> ++i
        """,
    "no value": r"""
        x ~= 3 <!> 3
        error: 3 <!> 3
        Error code: 3 <!> 3
        Exception: 3 <!> 3
        undefined: 3 <!> 3
        NaN: 3 <!> 3
        Step: 3 <!> 3
        page: 3 <!> 3
        exit code: 3 <!> 3
        Traceback: 3 <!> 3
        x =~ 3 <!> 3
        x ≅ 3 <!> 3
        x ≡ 3 <!> 3
        5... <!> 5
        ...5 <!> 5
        5 vs 1 <!> 5
        5+ <!> 5
        5 ± 1 <!> 5
        approx. 3 <=> 3
        3 or 4 <!> 4
        between 3 and 4 <!> 4
        3 to 4 <!> 4
        3 => Total: 3
        3 => Number of steps: 3
        """,
}  # fmt: skip
