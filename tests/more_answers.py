r"""A thousand more pairs of answers, in the notation of answers.py, each decided before it was tried."""

MORE_ANSWERS = {
    "integers": r"""
        0 <=> -0
        0 <=> 0.0
        7 <=> 7.
        7 <=> +7
        7 <=> \boxed{7}
        7 <=> $7$.
        7 <=> {7}
        7 <=> (7)
        7 <=> \mathbf{7}
        7 <=> \text{7}
        7 <=> \displaystyle 7
        7 <=> 7\,
        7 <=> \left(7\right)
        7 <=> \underline{7}
        -7 <=> (-7)
        -7 <=> -\,7
        -7 <=> - 7
        -7 <=> —7
        7 <!> 7!
        7 <!> 77
        7 <!> -7
        7 <!> 7^
        7 <!> 7\%\ \text{of } 10
        7 <!> \sqrt{7}
        7 <!> |x| = 7
        7 <!> 07:00
        2024 <=> 2,024
        2024 <!> 2.024
        123456789 <=> 123,456,789
        123456789 <=> 123 456 789
        123456789 <!> 123456788
        1000000 <=> 10^6
        1000000 <=> 1e6
        1000000 <=> 1 million
        1000000 <!> 1 billion
        9007199254740993 <!> 9007199254740992
        3 \cdot 4 => 12
        12 => 3 \times 4 = 12
        12 => 3 + 9 = 12
        12 !> 3 + 9 = 13
        12 !> 12 = 13
        24 <=> 4!
        -1 <!> 1-
        5 <!> 5 - 1
        5 + 0 => 5
        5 <!> 5 mod 7
        3 \pmod{7} <!> 4 \pmod{7}
        3 \pmod{7} <!> 3 \pmod{5}
        x \equiv 3 \pmod{7} <=> x ≡ 3 (mod 7)
        x \equiv 3 \pmod{7} <!> x \equiv 3 \pmod{5}
        x \equiv 3 \pmod{7} <!> 3
        """,
    "decimals": r"""
        0.25 <=> .25
        0.25 <=> 0.250
        0.25 <=> 1/4
        0.25 <=> 0,25
        0.25 <!> 0.025
        0.25 <!> 25
        0.25 <=> 25\%
        3.14159 <!> \pi
        \pi <!> 3.14
        \sqrt{2} <!> 1.414
        2.50 <=> 2.5
        1.234 <!> 1234
        1,234 <!> 1.234
        1.000.000,50 <=> 1000000.5
        -0.5 <=> -.5
        -0.5 <=> −0,5
        0.1 <!> 0.10000001
        0.3333 <!> 0.333
        0.142857142857... <=> 1/7
        1.999... <=> 2
        0.66 <!> 2/3
        100.0 <=> 100
        100.0 <=> 1e2
        """,
    "fractions": r"""
        3/4 <=> \frac{3}{4}
        3/4 <=> \tfrac34
        3/4 <=> \cfrac{3}{4}
        3/4 <=> {3 \over 4}
        3/4 <=> \frac{6}{8}
        3/4 <=> ¾
        3/4 <=> 75\%
        3/4 <=> 0.75
        3/4 <=> 3 / 4
        3/4 <=> 3÷4
        3/4 <=> \left(\frac{3}{4}\right)
        3/4 <=> 3\cdot\frac{1}{4}
        3/4 <!> 4/3
        3/4 <!> 34
        3/4 <!> 3
        3/4 <!> -3/4
        3/4 <!> 3.4
        -3/4 <=> -\frac34
        -3/4 <=> \frac{3}{-4}
        -3/4 <=> -(3/4)
        -3/4 <=> (-3)/4
        \frac{a}{b} <=> a/b
        \frac{a}{b} <!> b/a
        \frac{a+b}{2} <=> (a+b)/2
        \frac{a+b}{2} <!> a+b/2
        \frac{x}{y} <=> x y^{-1}
        \frac{\frac12}{3} <=> 1/6
        \frac{\frac12}{3} <!> 3/2
        \frac{22}{7} <!> \pi
        \frac{10}{4} <=> 5/2
        \frac{0}{5} => 0
        \frac{5}{0} <!> \infty
        -\frac{7}{3} <!> \frac{7}{3}
        \frac{-7}{-3} <=> 7/3
        """,
    "mixed numbers": r"""
        2\frac{1}{3} <=> 7/3
        2\frac{1}{3} <=> 2 1/3
        2\frac{1}{3} <=> 2⅓
        2\frac{1}{3} <=> 2 + 1/3
        2\frac{1}{3} <!> 2/3
        2\frac{1}{3} <!> 21/3
        2\frac{1}{3} <!> 2.13
        2\frac{1}{3} <=> 2\;\frac13
        2\frac{1}{3}\text{ hours} <=> 140 minutes
        -2\frac{1}{3} <=> -7/3
        -2\frac{1}{3} <!> -5/3
        1\frac{1}{2} cups <=> 1.5 cups
        1\frac{1}{2} <=> 150\%
        10 1/10 <=> 10.1
        5 5/5 <!> 6 5/5
        """,
    "percent": r"""
        40\% <=> 40%
        40\% <=> 40 percent
        40\% <=> 40 per cent
        40\% <=> 0.4
        40\% <=> 2/5
        40\% <=> 40.0\%
        40\% <=> \frac{2}{5}
        40\% <=> 40
        40\% <!> 4
        40\% <!> 0.04
        40\% <!> 60\%
        40\% <!> 40 cm
        40\% <!> 40°
        40\% <!> $40
        40\% <!> 40 dollars
        40\% <!> 40 percentage points less
        40\% <=> x = 40\%
        40\% <!> 40‰
        40\% <!> -40\%
        33\frac{1}{3}\% <=> 1/3
        33\frac{1}{3}\% <=> 33 1/3 %
        33\frac{1}{3}\% <!> 33\%
        100\% <=> 1
        120% <=> 1.2
        40 pour cent <=> 40\%
        百分之四十 <!> 50%
        40％ <=> 40%
        """,
    "money": r"""
        $25 <=> 25
        $25 <=> 25 dollars
        $25 <=> 25 USD
        $25 <=> \$25.00
        $25 <=> $ 25
        $25 <=> USD 25
        $25 <=> 25 bucks
        $25 <=> 2500 cents
        $25 <!> 25 cents
        $25 <!> £25
        $25 <!> 25 euros
        $25 <!> -$25
        $25 <!> $2.5
        $25 <!> CA$25
        25 dollars <!> 25 Canadian dollars
        25 dollars <!> 25 Australian dollars
        A$25 <!> $25
        US$25 <=> $25
        25 US dollars <=> $25
        25 Hong Kong dollars <!> 25 dollars
        25 CAD <!> 25 USD
        25 CAD <=> C$25
        £25 <=> 25 pounds
        £25 <=> 25 GBP
        £25 <=> £25.00
        £25 <!> 25 lbs
        £25 <=> 25 pounds sterling
        £25 <!> 25 pence
        €25 <=> 25 Euro
        €25 <=> 25,00 €
        €25 <=> 25 EUR
        €25 <!> 25 cents
        25 € <!> 25 $
        25 rupees <=> ₹25
        25 rupees <=> Rs 25
        25 rupees <!> 25 rubles
        25 pesos <!> 25 dollars
        25 yuan <=> 25元
        25 yuan <=> ¥25
        25 yen <=> ¥25
        25 yuan <!> 25 yen
        25块 <=> 25元
        25 kronor <!> $25
        $1,250.75 <=> 1250.75
        $1,250.75 <!> 1250.57
        $1.25 million <=> 1,250,000
        $1.25 million <=> $1.25M
        $1.25 million <=> 1.25 million dollars
        $1.25 million <!> $1.25
        $4.5 <=> $4.50
        $4.5 <!> $45
        $5 an hour <=> $5 per hour
        $5 each <=> $5
        """,
    "units": r"""
        12 cm <=> 12\text{ cm}
        12 cm <=> 12\,\mathrm{cm}
        12 cm <=> 12cm
        12 cm <=> 12\ \text{centimeters}
        12 cm <=> 12 centimetres
        12 cm <=> 0.12 m
        12 cm <=> 120 mm
        12 cm <=> 12
        12 cm <!> 12 mm
        12 cm <!> 12 m
        12 cm <!> 12 cm^2
        12 cm <!> 12 in
        12 cm <!> 12 kg
        12 cm <!> 1.2 m
        12 cm^2 <=> 12 square centimeters
        12 cm^2 <=> 12\text{ cm}^2
        12 cm^2 <=> 12\text{cm}^{2}
        12 cm^2 <=> 12 sq cm
        12 cm^2 <=> 12 cm squared
        12 cm^2 <=> 12 centimeters squared
        12 cm^2 <!> 12 cm^3
        12 cm^2 <=> 0.0012 m^2
        12 cm^3 <=> 12 mL
        12 cm^3 <=> 12 cc
        12 cm^3 <=> 12 cubic centimeters
        60 km/h <=> 60 kilometers per hour
        60 km/h <=> 60 kmh
        60 km/h <=> 60 kph
        60 km/h <=> 60\,\text{km/h}
        60 km/h <=> 60\frac{\text{km}}{\text{h}}
        60 km/h <=> 60 km h^{-1}
        60 km/h <=> 60 km/hr
        60 km/h <=> 1 km/min
        60 km/h <!> 60 mph
        60 km/h <!> 60 m/s
        60 km/h <!> 60 km
        60 miles per hour <=> 60 mph
        60 miles per gallon <=> 60 mpg
        60 miles per gallon <!> 60 mph
        5 kg <=> 5000 g
        5 kg <=> 5 kilograms
        5 kg <=> 5 kilos
        5 kg <!> 5 lb
        5 kg <!> 5 grams
        5 kg <!> 500 g
        5 lb <=> 80 oz
        5 lb <=> 5 lbs.
        5 lb <!> 5 oz
        5 pounds <!> £6
        5 MPa <!> 5 kPa
        5 MPa <=> 5000 kPa
        5 mPa <=> 0.005 Pa
        5 MHz <!> 5 mHz
        5 MHz <=> 5 megahertz
        5 mW <!> 5 MW
        5 Gb <!> 5 GB
        5 GB <=> 5000 MB
        5 mA <=> 0.005 A
        5 mA <!> 5 MA
        5 V <=> 5 volts
        5 V <!> 5 W
        5 C <!> 5 F
        5 °C <=> 5 degrees Celsius
        5 °C <!> 5 °F
        5 °C <!> 5 K
        5 K <=> 5 kelvins
        5 mol <=> 5 moles
        5 mol <!> 5 mmol
        5 L <=> 5 liters
        5 L <=> 5000 mL
        5 L <=> 5 dm^3
        5 L <!> 5 gallons
        5 litres <=> 5 l
        5 ha <=> 50000 m^2
        5 acres <!> 5 hectares
        5 ft <=> 60 inches
        5 ft <=> 5'
        5 ft <!> 5 in
        5 ft <!> 5 m
        5 inches <=> 5 in
        5 inches <=> 5 in.
        5 yards <=> 15 feet
        5 units <=> 5
        5 units <=> 5 square units
        5 square units <=> 5
        5 apples <=> 5
        5 apples <!> 5 oranges
        5 apples <=> 5 apples.
        5 boys <!> 5 girls
        5 blue marbles <!> 5 red marbles
        5 marbles <=> 5 blue marbles
        5 men <!> 5 women
        5 dB <=> 5 decibels
        5 dB <!> 5 B
        5 eV <!> 5 V
        5 keV <=> 5000 eV
        5 N/m <!> 5 N·m
        5 N m <=> 5 Nm
        5 rad <=> 5 radians
        5 Ω <=> 5 ohms
        5 Ω <=> 5 \Omega
        5 kΩ <!> 5 Ω
        5 rpm <!> 5 rps
        5 light-years <!> 5 parsecs
        5 bits <!> 5 bytes
        5 people <=> 5 persons
        5 Stück <=> 5
        5 pommes <!> 5 poires
        5 个苹果 <=> 5
        5 Meter <=> 5 m
        5 mètres <=> 5 m
        5 米 <=> 5 m
        5 公里 <=> 5 km
        5 公斤 <=> 5 kg
        5 千克 <=> 5 kg
        5 小时 <=> 5 hours
        5 分钟 <=> 5 minutes
        5 Stunden <=> 5 hours
        5 heures <=> 5 hours
        5 Minuten <!> 5 hours
        5 Tage <!> 5 Stunden
        """,
    "angles": r"""
        90° <=> \frac{\pi}{2}
        90° <=> \frac{\pi}{2} \text{ radians}
        90° <=> \frac{\pi}{2} rad
        90^\circ <=> 90 degrees
        90^\circ <=> 90
        90^\circ <=> 90 deg
        45^\circ <=> \frac{\pi}{4}
        45^\circ <!> \frac{\pi}{2}
        360° <=> 2\pi
        360° <!> \pi
        -30^\circ <=> -\frac{\pi}{6}
        \frac{\pi}{2} <!> 90
        \frac{\pi}{3} <=> 60^{\circ}
        \frac{\pi}{3} <!> 30^\circ
        1 rad <!> 1°
        22.5° <=> \frac{\pi}{8}
        \theta = 45^\circ <=> 45^\circ
        \theta = 45^\circ <=> \frac{\pi}{4}
        45^\circ 30' <=> 45.5^\circ
        45°30' <!> 45°
        30°, 60° <=> 60^\circ, 30^\circ
        30°, 60° <!> 30°, 70°
        30^\circ, 60^\circ, 90^\circ <=> 30, 60, 90
        \sin 45^\circ <=> \frac{\sqrt{2}}{2}
        \cos(60°) <=> 1/2
        \cos 60° <!> \cos 60
        \tan \frac{\pi}{4} <=> 1
        """,
    "time": r"""
        3 hours <=> 180 minutes
        3 hours <=> 3 hrs
        3 hours <=> 3 h
        3 hours <!> 3 minutes
        3 hours <!> 3 days
        1 hour 15 minutes <=> 75 minutes
        1 hour 15 minutes <=> 1.25 hours
        1 hour 15 minutes <=> 1 h 15 min
        1 hour 15 minutes <=> 1hr 15min
        1 hour 15 minutes <=> 1\text{ hour }15\text{ minutes}
        1 hour 15 minutes <=> 1\text{ hour and }15\text{ minutes}
        1 hour 15 minutes <!> 1.15 hours
        1 hour 15 minutes <!> 115 minutes
        1 hour 15 minutes <!> 75 hours
        2 weeks <=> 14 days
        2 weeks <!> 2 days
        1 min 30 s <=> 90 seconds
        1 min 30 s <=> 1.5 minutes
        1 min 30 s <!> 1.3 minutes
        3:45 <=> 3:45
        3:45 <!> 3:54
        3:45 PM <=> 15:45
        3:45 PM <=> 3:45pm
        3:45 PM <=> 3:45 p.m.
        3:45 PM <!> 3:45 AM
        3:45 PM <!> 3:15 PM
        3:45 PM <=> 03:45 PM
        9 AM <=> 9:00 AM
        9 AM <=> 9 o'clock AM
        9 AM <=> 9 am
        9 AM <=> 09:00
        9 AM <!> 9 PM
        noon <=> 12:00 PM
        noon <!> midnight
        half past three <!> half past four
        1 century <=> 100 years
        1 decade <!> 100 years
        3 years <=> 36 months
        90 s <!> 90 min
        1.5 h <=> 1 h 30 min
        """,
    "dates": r"""
        March 5, 2021 <=> 5 March 2021
        March 5, 2021 <=> Mar 5, 2021
        March 5, 2021 <=> 2021-03-05
        March 5, 2021 <=> March 5th, 2021
        March 5, 2021 <=> the 5th of March, 2021
        March 5, 2021 <=> March 5 2021
        March 5, 2021 <=> Friday, March 5, 2021
        March 5, 2021 <=> 2021/03/05
        March 5, 2021 <!> March 5, 2022
        March 5, 2021 <!> May 3, 2021
        March 5, 2021 <!> March 15, 2021
        March 5, 2021 <!> 2021-05-03
        March 5, 2021 <!> April 5, 2021
        March 5 <=> 5 March
        March 5 <!> May 5
        March 2021 <!> April 2021
        March <!> May
        1999 <=> 1999
        1999 <!> 1998
        1999 AD <=> 1999
        1999 <!> 1999 BC
        1990s <=> the 1990s
        1990s <!> 1980s
        Monday <=> monday
        Monday <!> Tuesday
        Tuesday <!> Thursday
        18th century <!> 19th century
        18th century <!> 18
        2021-03-05 <!> 2021-3-6
        31/12/2020 <=> December 31, 2020
        """,
    "ratios": r"""
        3:4 <=> 3 : 4
        3:4 <=> 3 to 4
        3:4 <=> 6:8
        3:4 <=> 3/4
        3:4 <=> \frac{3}{4}
        3:4 <=> 3\!:\!4
        3:4 <=> 0.75:1
        3:4 <=> 3 \text{ to } 4
        3:4 <=> 3：4
        3:4 <!> 4:3
        3:4 <!> 3
        3:4 <!> 7
        3:4 <!> 3:5
        3:4 <!> 34
        1:2:3 <!> 3:2:1
        1:2:3 <!> 1:2
        1:\sqrt{2} <=> 1:√2
        1:\sqrt{2} <!> \sqrt{2}:1
        1 in 5 <=> 1/5
        1 in 5 <=> 20\%
        4 out of 5 <=> 80\%
        4 out of 5 <!> 5 out of 4
        2/3 <=> 2 out of 3
        1.5 h <!> 90
        2\frac{1}{3} <!> 2-1/3
        """,
    "coordinates": r"""
        (3, -4) <=> (3,-4)
        (3, -4) <=> \left(3, -4\right)
        (3, -4) <=> (3.0, -4.0)
        (3, -4) <=> x = 3, y = -4
        (3, -4) <=> x=3 \text{ and } y=-4
        (3, -4) <=> (x,y)=(3,-4)
        (3, -4) <=> P(3,-4)
        (3, -4) <=> P = (3,-4)
        (3, -4) <=> \langle 3, -4\rangle
        (3, -4) <=> 3, -4
        (3, -4) <!> (-4, 3)
        (3, -4) <!> (3, 4)
        (3, -4) <!> \{3, -4\}
        (3, -4) <!> 3
        (3, -4) <!> -1
        (3, -4) <!> (3, -4, 0)
        (3, -4) <=> (3; -4)
        (0, \frac{1}{2}) <=> (0, 0.5)
        (0, \frac{1}{2}) <=> \left(0,\frac12\right)
        (\sqrt{2}, \sqrt{2}) <=> (√2, √2)
        (\sqrt{2}, \sqrt{2}) <!> (2, 2)
        (1, 2), (3, 4) <=> (1, 2) and (3, 4)
        (1, 2), (3, 4) <=> \{(1, 2), (3, 4)\}
        (1, 2), (3, 4) <!> (2, 1), (3, 4)
        (1, 2), (3, 4) <!> (1, 2)
        (1, 2) <!> {1, 2}
        (1, 2) <!> {2, 1}
        (1,2) => the point (1,2)
        (a, b) <!> (b, a)
        (2, \pi) <=> (2, π)
        3i + 4j <=> 3\mathbf{i} + 4\mathbf{j}
        3\hat{i} + 4\hat{j} <!> 4\hat{i} + 3\hat{j}
        """,
    "intervals": r"""
        [2, 5] <=> 2 \le x \le 5
        [2, 5] <=> x \in [2, 5]
        [2, 5] <=> [2; 5]
        [2, 5] <=> \left[2, 5\right]
        [2, 5] <=> 2 <= x <= 5
        [2, 5] <!> (2, 5)
        [2, 5] <!> [2, 5)
        [2, 5] <!> \{2, 5\}
        [2, 5] <!> [5, 2]
        [2, 5] <!> 2, 5
        [2, 5] <!> -3
        (2, 5) <=> 2 < x < 5
        (2, 5) <=> ]2, 5[
        (2, 5) <=> x > 2 and x < 5
        (2, 5) <=> x>2, x<5
        (2, 5) <!> x > 2 or x < 5
        (-\infty, 5) <=> x < 5
        (-\infty, 5) <=> (-inf, 5)
        (-\infty, 5) <=> (-infinity, 5)
        (-\infty, 5) <!> (5, \infty)
        (-\infty, 5) <!> (-\infty, 5]
        (-\infty, \infty) <=> \mathbb{R}
        (-\infty, \infty) <=> all real numbers
        (-\infty, 0) \cup (0, \infty) <=> x \ne 0
        (-\infty, 0) \cup (0, \infty) <=> \mathbb{R} \setminus \{0\}
        (-\infty, 0) \cup (0, \infty) <=> all real numbers except 0
        (-\infty, 0) \cup (0, \infty) <!> \mathbb{R}
        (-\infty, 0) \cup (0, \infty) <=> (-∞,0)∪(0,∞)
        (-\infty, 0) \cup (0, \infty) <=> (-inf,0) U (0,inf)
        (-\infty, 0) \cup (0, \infty) <=> x<0 or x>0
        [1, 2] \cup [3, 4] <=> [3,4] ∪ [1,2]
        [1, 2] \cup [3, 4] <!> [1, 4]
        [1, 2] \cup [2, 4] <=> [1, 4]
        [1, 2] \cup \{3\} <=> \{3\} \cup [1, 2]
        [1, 2] \cup \{3\} <!> [1, 3]
        [0, 2\pi) <=> 0 \le \theta < 2\pi
        [0, 2\pi) <!> [0, 2\pi]
        """,
    "inequalities": r"""
        x \ge 3 <=> at least 3
        x \ge 3 <=> x>=3
        x \ge 3 <=> x ≥ 3
        x \ge 3 <=> 3 ≤ x
        x \ge 3 <=> [3, \infty)
        x \ge 3 <=> x \geqslant 3
        x \ge 3 <=> x is greater than or equal to 3
        x \ge 3 <!> x > 3
        x \ge 3 <!> x = 3
        x \ge 3 <!> 3
        x \ge 3 <!> x \le 3
        x > 3 <=> x is greater than 3
        x > 3 <=> x is more than 3
        x > 3 <!> x is less than 3
        x < 3 <=> x is less than 3
        x \le 3 <=> x is at most 3
        x \le 3 <=> x =< 3
        x \le 3 <=> x \leq 3
        5 <!> fewer than 5
        5 <!> at most 5
        5 <!> up to 5
        5 <!> over 5
        5 <!> nearly 5
        less than 5 <=> less than 5
        less than 5 <!> more than 5
        less than 5 <=> < 5
        more than 5 <=> > 5
        > 5 <!> 5
        \ge 5 <!> 5
        \le 5 <!> \ge 5
        a > b <=> b < a
        a > b <!> a < b
        A > B > C <!> C > B > A
        2x > 6 <=> x > 3
        x^2 < 4 <=> -2 < x < 2
        x^2 < 4 <!> x < 2
        -1 < x < 4 <=> x > -1 and x < 4
        -1 < x < 4 <!> -1 < x \le 4
        x \neq 1, 2 <!> x = 1, 2
        x \neq 1 <=> x ≠ 1
        x \neq 1 <!> x = 1
        x \neq 1 <!> 1
        """,
    "sets": r"""
        \{1, 2, 3\} <=> \{3, 2, 1\}
        \{1, 2, 3\} <=> {1, 2, 3}
        \{1, 2, 3\} <=> {1,2,3}
        \{1, 2, 3\} <=> 1, 2, 3
        \{1, 2, 3\} <=> 1, 2 and 3
        \{1, 2, 3\} <=> \left\{1, 2, 3\right\}
        \{1, 2, 3\} <=> \{1\} \cup \{2, 3\}
        \{1, 2, 3\} <=> \{1, 2\} \cup \{2, 3\}
        \{1, 2\} \cup \{3\} <=> \{3\} \cup \{1, 2\}
        \{1, 2\} \cup \{3\} <=> 1, 2, 3
        \{1, 2\} \cup \{3\} <!> \{1, 2\}
        \{1, 2, 3\} <!> (1, 2, 3)
        \{1, 2, 3\} <!> \{1, 2\}
        \{1, 2, 3\} <!> \{1, 2, 3, 4\}
        \{1, 2, 3\} <!> 6
        \{1, 2, 3\} <!> 123
        \{-2, 2\} <=> \pm 2
        \{-2, 2\} <=> x = \pm 2
        \{-2, 2\} <=> x = -2 or x = 2
        \{-2, 2\} <=> -2 \text{ or } 2
        \{-2, 2\} <=> x=2, x=-2
        \{-2, 2\} <=> +2, -2
        \{-2, 2\} <!> 2
        \{-2, 2\} <!> -2
        \{a, b\} <=> \{b, a\}
        \{a, b\} <!> \{a, c\}
        \{A, B\} <=> \{B, A\}
        \emptyset <=> the empty set
        \emptyset <=> \{ \}
        \emptyset <=> {}
        \emptyset <=> No solution
        \{1\} <=> 1
        \{x \mid x = 2k, k \in \mathbb{Z}\} <=> \{x | x = 2k, k \in \mathbb{Z}\}
        \{x \mid x = 2k, k \in \mathbb{Z}\} <!> \{x | x = 2k+1, k \in \mathbb{Z}\}
        \{x \mid 1 < x \le 3\} <=> (1, 3]
        \{x \mid 1 < x \le 3\} <!> (1, 3)
        \mathbb{N} <!> \mathbb{Z}
        \mathbb{Z}^+ <!> \mathbb{Z}
        """,
    "sequences": r"""
        1, 2, 3 <=> 1,2,3
        1, 2, 3 <=> 1; 2; 3
        1, 2, 3 <=> 3, 1, 2
        1, 2, 3 <=> 1、2、3
        [1, 2, 3] <=> [1,2,3]
        [1, 2, 3] <=> [1.0, 2.0, 3.0]
        [1, 2, 3] <!> [3, 2, 1]
        [1, 2, 3] <!> [1, 2]
        [1, 2, 3] <!> [1, 2, 3, 4]
        [1, 2, 3] <!> 6
        ['a', 'b', 'c'] <=> ["a","b","c"]
        ['a', 'b', 'c'] <!> ['c', 'b', 'a']
        [[1, 2], [3, 4]] <=> [[1,2],[3,4]]
        [[1, 2], [3, 4]] <!> [[1,3],[2,4]]
        1, 1, 2, 3, 5 <!> 1, 2, 3, 5
        1, 4, 9, \dots <!> 1, 4, 8, ...
        2n+1 <=> a_n = 2n+1
        2n+1 <!> 2n-1
        a_n = 3^n <=> 3^n
        a_n = 3^n <!> a_n = 3n
        1 < 2 < 3 <!> 3 < 2 < 1
        """,
    "matrices": r"""
        \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} <=> \begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}
        \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} <=> \begin{pmatrix}1&2\\3&4\\\end{pmatrix}
        \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} <=> [[1,2],[3,4]]
        \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} <=> \left(\begin{array}{cc}1&2\\3&4\end{array}\right)
        \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} <=> A = \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}
        \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} <!> \begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}
        \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} <!> \begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix}
        \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} <!> -2
        \begin{pmatrix} 1 \\ 2 \end{pmatrix} <!> \begin{pmatrix} 1 \\ 3 \end{pmatrix}
        \begin{pmatrix} 1/2 & 0 \end{pmatrix} <=> \begin{pmatrix} 0.5 & 0 \end{pmatrix}
        \begin{pmatrix} -1 \\ 2 \end{pmatrix} <!> \begin{pmatrix} 1 \\ 2 \end{pmatrix}
        \begin{pmatrix} a & b \\ c & d \end{pmatrix} <!> \begin{pmatrix} a & c \\ b & d \end{pmatrix}
        \begin{pmatrix} x \\ y \end{pmatrix} <=> \begin{bmatrix} x \\ y \end{bmatrix}
        \frac12\begin{pmatrix} 2 \\ 4 \end{pmatrix} <=> \begin{pmatrix} 1 \\ 2 \end{pmatrix}
        """,
    "polynomials": r"""
        x^2 - 3x + 2 <=> (x-1)(x-2)
        x^2 - 3x + 2 <=> 2 - 3x + x^2
        x^2 - 3x + 2 <=> x² − 3x + 2
        x^2 - 3x + 2 <=> x^2-3*x+2
        x^2 - 3x + 2 <=> x**2 - 3*x + 2
        x^2 - 3x + 2 <=> f(x) = x^2 - 3x + 2
        x^2 - 3x + 2 <=> x^{2}-3x+2
        x^2 - 3x + 2 <=> x(x-3)+2
        x^2 - 3x + 2 <!> x^2 + 3x + 2
        x^2 - 3x + 2 <!> x^2 - 3x - 2
        x^2 - 3x + 2 <!> x^3 - 3x + 2
        x^2 - 3x + 2 <!> 2x - 3x + 2
        x^2 - 3x + 2 <!> y^2 - 3y + 2
        x^2 - 3x + 2 <!> 2
        3x^2y <=> 3yx^2
        3x^2y <!> 3xy^2
        3x^2y <=> 3 x^2 y
        (x+2)^3 <=> x^3+6x^2+12x+8
        (x+2)^3 <!> x^3+8
        ab + bc <=> b(a+c)
        ab + bc <!> a(b+c)
        4x(x+1) <=> 4x^2+4x
        (a+b)(a-b) <=> a^2-b^2
        \frac{x^2-1}{x-1} <=> x+1
        2(x+y) <=> 2x+2y
        2(x+y) <!> 2x+y
        -x^2 <=> -(x^2)
        x^{10} <=> x^10
        x^{10} <!> x^1 0
        n(n+1)/2 <=> \frac{n(n+1)}{2}
        n(n+1)/2 <=> \frac{n^2+n}{2}
        n(n+1)/2 <!> \frac{n(n-1)}{2}
        """,
    "equations": r"""
        y = 2x + 3 <=> 2x + 3
        y = 2x + 3 <=> y - 2x = 3
        y = 2x + 3 <=> 2x - y + 3 = 0
        y = 2x + 3 <=> y = 3 + 2x
        y = 2x + 3 <!> y = 3x + 2
        y = 2x + 3 <!> x = 2y + 3
        y = 2x + 3 <!> y = 2x - 3
        x^2 + y^2 = 25 <=> x^2 + y^2 - 25 = 0
        x^2 + y^2 = 25 <=> y^2 + x^2 = 25
        x^2 + y^2 = 25 <!> x^2 + y^2 = 5
        x^2 + y^2 = 25 <!> 25
        x^2 + y^2 = 25 <!> x^2 - y^2 = 25
        x = 4 <=> 4
        x = 4 <=> 4 = x
        x = 4 <=> x=4.0
        x = 4 <!> x = -4
        x = 4 <!> y = 4
        x = 1, y = 2 <=> x=1; y=2
        y = \frac{1}{x} <=> xy = 1
        F = ma <=> ma
        F = ma <=> F = m a
        F = ma <=> F = am
        F = ma <!> F = m/a
        E = mc^2 <=> mc^2
        E = mc^2 <!> E = mc
        E = mc^2 <!> E = m^2c
        y = e^x <=> e^x
        y = e^x <!> y = x^e
        \frac{x^2}{4} + \frac{y^2}{9} = 1 <=> 9x^2 + 4y^2 = 36
        \frac{x^2}{4} + \frac{y^2}{9} = 1 <!> \frac{x^2}{9} + \frac{y^2}{4} = 1
        y = x^2 + C <!> y = x^2
        """,
    "radicals": r"""
        \sqrt{12} <=> 2\sqrt{3}
        \sqrt{12} <=> 2√3
        \sqrt{12} <=> 2*sqrt(3)
        \sqrt{12} <=> sqrt(12)
        \sqrt{12} <=> 12^{1/2}
        \sqrt{12} <=> 12^{0.5}
        \sqrt{12} <!> 2\sqrt{2}
        \sqrt{12} <!> 12
        \sqrt{12} <!> \sqrt[3]{12}
        \sqrt{12} <!> 3\sqrt{2}
        \sqrt{12} <!> 3.46
        \frac{\sqrt{2}}{2} <=> \frac{1}{\sqrt{2}}
        \frac{\sqrt{2}}{2} <=> √2/2
        \frac{\sqrt{2}}{2} <=> sqrt(1/2)
        \frac{\sqrt{2}}{2} <!> \sqrt{2}
        \frac{1+\sqrt{5}}{2} <=> (1+√5)/2
        \frac{1+\sqrt{5}}{2} <=> \frac12 + \frac{\sqrt5}{2}
        \frac{1+\sqrt{5}}{2} <!> \frac{1-\sqrt{5}}{2}
        \sqrt[3]{2} <=> 2^{1/3}
        \sqrt[3]{2} <=> ∛2
        \sqrt[3]{2} <!> 3\sqrt{2}
        \sqrt{3} - \sqrt{2} <!> \sqrt{2} - \sqrt{3}
        \sqrt{3+2\sqrt{2}} <=> 1+\sqrt{2}
        \sqrt{x^2+1} <!> x+1
        5\sqrt{2} \text{ cm} <=> 5\sqrt{2}
        5\sqrt{2} \text{ cm} <!> 5\sqrt{2} \text{ m}
        5\sqrt{2} \text{ m} <=> 500\sqrt{2} \text{ cm}
        \sqrt{-4} <=> 2i
        """,
    "trigonometry": r"""
        \sin(2x) <=> 2\sin x\cos x
        \sin(2x) <=> sin(2x)
        \sin(2x) <=> sin 2x
        \sin(2x) <!> 2\sin x
        \sin(2x) <!> \sin(x)
        \sin(2x) <!> \cos(2x)
        \sin^2 x <=> (\sin x)^2
        \sin^2 x <=> 1 - \cos^2 x
        \sin^2 x <!> \sin x^2
        \tan x <=> \frac{\sin x}{\cos x}
        \arcsin x <=> \sin^{-1} x
        \arcsin x <!> \frac{1}{\sin x}
        \cos\theta <!> \cos\phi
        \frac{\pi}{6} + 2k\pi <=> 2k\pi + \frac{\pi}{6}
        \frac{\pi}{6} + 2k\pi <=> \frac{\pi}{6} + 2\pi k, k \in \mathbb{Z}
        \frac{\pi}{6} + 2k\pi <!> \frac{\pi}{6} + k\pi
        \sec x <=> \frac{1}{\cos x}
        \arctan 2 <!> \tan 2
        \pi/2 <=> pi/2
        \pi/2 <=> 0.5\pi
        \pi/2 <=> ½π
        \pi/2 <=> \frac12 \pi
        \pi/2 <!> \frac{2}{\pi}
        \pi/2 <!> 1.57
        3\pi <=> 3pi
        3\pi <=> 3 * pi
        3\pi <=> \pi \cdot 3
        3\pi <!> 3
        25\pi \text{ cm}^2 <=> 25π
        """,
    "complex": r"""
        3 + 4i <=> 3+4i
        3 + 4i <=> 4i + 3
        3 + 4i <=> 3 + 4\mathrm{i}
        3 + 4i <=> z = 3+4i
        3 + 4i <=> 3 + 4 i
        3 + 4i <!> 3 - 4i
        3 + 4i <!> 4 + 3i
        3 + 4i <!> 5
        3 + 4i <!> -3 + 4i
        (1+i)^2 <=> 2i
        \frac{1}{1+i} <=> \frac{1-i}{2}
        \frac{1}{1+i} <!> \frac{1+i}{2}
        2e^{i\pi/3} <=> 1 + i\sqrt{3}
        2e^{i\pi/3} <!> 1 - i\sqrt{3}
        \pm i <=> i, -i
        \pm i <!> i
        3 \pm 2i <=> 3+2i, 3-2i
        3 \pm 2i <=> 3 + 2i \text{ and } 3 - 2i
        3 \pm 2i <!> 2 \pm 3i
        |3+4i| <=> 5
        """,
    "scientific": r"""
        3 \times 10^8 <=> 3e8
        3 \times 10^8 <=> 300000000
        3 \times 10^8 <=> 300,000,000
        3 \times 10^8 <=> 3×10^8
        3 \times 10^8 <=> 3x10^8
        3 \times 10^8 <=> 3 · 10^8
        3 \times 10^8 <=> 3*10**8
        3 \times 10^8 <=> 3.0 \times 10^8
        3 \times 10^8 <=> 0.3 \times 10^9
        3 \times 10^8 <!> 3 \times 10^7
        3 \times 10^8 <!> 3 \times 10^{-8}
        3 \times 10^8 <!> 30^8
        3 \times 10^8 <!> 3108
        3 \times 10^8 <!> 3
        3 \times 10^8 m/s <=> 3e8 m/s
        3 \times 10^8 m/s <=> 3 \times 10^5 km/s
        3 \times 10^8 m/s <!> 3 \times 10^8 km/s
        3 \times 10^8\ \text{m/s} <=> 3\times10^{8}\,\mathrm{m\,s^{-1}}
        6.02 \times 10^{23} <!> 6.02 \times 10^{22}
        6.02 \times 10^{23} <!> 6.2 \times 10^{23}
        1.6 \times 10^{-19} C <=> 1.6e-19 coulombs
        1E-3 <=> 0.001
        1e-3 <!> 1e3
        """,
    "options": r"""
        B <=> (B)
        B <=> \text{B}
        B <=> \textbf{(B)}
        B <=> \mathrm{(B)}
        B <=> b
        B <=> B.
        B <=> B)
        B <=> [B]
        B <=> Option B
        B <=> option (B)
        B <=> Choice B
        B <=> Answer: B
        B <=> The answer is B
        B <=> \textbf{(B)}\ 12
        B <=> (B) 12
        B <=> B. 12
        B <=> B: 12
        B <!> A
        B <!> D
        B <!> AB
        B <!> A, B
        B <!> 8
        B <!> not B
        B <!> neither B
        B <!> B or C
        A, C <=> C and A
        A, C <=> A; C
        A, C <=> A C
        A, C <=> A/C
        A, C <=> (A), (C)
        A, C <!> B, C
        A, C <!> A, B, C
        A, B, D <=> ABD
        A, B, D <=> A, B, and D
        A, B, D <!> A, B
        C. Paris <=> C
        C. Paris <!> C. London
        C. Paris <!> B. Paris
        (i) and (ii) <=> (i), (ii)
        (i) and (ii) <!> (i) and (iii)
        I and II <=> I, II
        I and II <!> I and III
        I only <!> II only
        Both A and B <=> A and B
        None of the above <!> All of the above
        甲 <!> 乙
        """,
    "yes or no": r"""
        Yes <=> yes
        Yes <=> YES.
        Yes <=> \text{Yes}
        Yes <!> No
        Yes <!> Not yes
        Yes <!> yes and no
        No <!> None
        True <=> true
        True <=> \text{True}
        True <=> TRUE
        True <!> False
        True <!> not true
        True <!> untrue
        Correct <!> Incorrect
        possible <!> impossible
        even <!> odd
        even <!> uneven
        convergent <!> divergent
        increasing <!> decreasing
        positive <!> negative
        rational <!> irrational
        Yes <=> "Yes"
        Yes <=> **Yes**
        """,
    "names and text": r"""
        George Washington <=> george washington
        George Washington <=> \text{George Washington}
        George Washington <=> \textbf{George Washington}
        George Washington <=> "George Washington"
        George Washington <!> Washington George Bush
        George Washington <!> George Bush
        George Washington <!> Martha Washington
        New York <=> New  York
        New York <!> New Jersey
        Évian <!> Evian-les-Bains
        café <=> café
        Alice <!> Bob
        Alice, Bob <=> Alice and Bob
        Alice and Bob <!> Alice
        Alice and Bob <!> Alice and Carol
        red <!> blue
        red <=> Red
        red <!> infrared
        equilateral triangle <!> isosceles triangle
        a circle <=> circle
        circle <!> semicircle
        parabola <!> hyperbola
        hypotenuse <!> leg
        East <!> West
        photosynthesis <=> Photosynthesis.
        photosynthesis <!> photorespiration
        H2SO4 <=> H_2SO_4
        H2SO4 <=> \mathrm{H_2SO_4}
        H2SO4 <=> H₂SO₄
        H2SO4 <!> H2SO3
        H2SO4 <!> h2so3
        CO2 <!> CO
        Na^+ <!> Na^{2+}
        NaCl <!> NaCl2
        AaBB <!> AABb
        Bb <!> bb
        BB <!> Bb
        XX <!> XY
        ATCG <=> atcg
        ATCG <!> GCTA
        1s^2 2s^2 <!> 1s^2 2s^1
        ^{14}C <!> ^{12}C
        C <=> C
        c <=> c
        speed of light <=> the speed of light
        """,
    "bases and codes": r"""
        1010_2 <=> 1010_{2}
        1010_2 <=> 1010_{\text{two}}
        1010_2 <=> (1010)_2
        1010_2 <!> 1010
        1010_2 <!> 1010_3
        1010_2 <!> 1011_2
        0x1F <=> 0x1f
        0x1F <!> 0x2F
        0b101 <!> 0b111
        A3_{16} <=> A3_{16}
        A3_{16} <!> A4_{16}
        $AB_{12}$ <=> AB_{12}
        01101 !> 1101
        12:00 !> 12
        555-1234 <!> -679
        10.0.0.1 <!> 10.0.0.11
        v1.2.3 <!> v1.2.4
        ISBN 123 <!> ISBN 124
        3.10 <!> 3.11
        """,
    "number words": r"""
        5 million <=> 5000000
        5 million <=> 5\text{ million}
        5 million <=> 5 \times 10^6
        5 million <=> 5 Million
        5 million <!> 5 thousand
        5 million people <=> 5,000,000
        5 million people <=> 5,000,000 people
        1.5 billion <=> 1,500,000,000
        1.5 billion <=> 1500 million
        1.5 billion <!> 1.5 million
        3 dozen <=> 36
        3 dozen eggs <=> 36
        3 dozen <!> 3
        5 Millionen <!> 5
        5 Milliarden <=> 5,000,000,000
        5 Milliarden <!> 5,000,000
        5 millions <=> 5,000,000
        5 milliards <=> 5 billion
        5 milliards <!> 5 million
        5 Tausend <=> 5000
        5 mille <=> 5000
        5 万 <=> 50,000
        5万元 <=> 50000元
        5 亿 <=> 500,000,000
        5 亿 <!> 50,000,000
        3千 <=> 3000
        1,5 <!> 15
        1.500,75 <=> 1500.75
        2 500,75 <=> 2500.75
        3,14 <=> 3.14
        3,1416 <=> 3.1416
        10,5 <=> 10.5
        12,75 € <=> €12.75
        12.345,67 <!> 12.34567
        seven <=> seven
        seven <!> eight
        sieben <!> acht
        sept <!> huit
        七 <=> 七
        七 <!> 八
        二十 <!> 十二
        42 !> forty-three
        42 !> dreiundvierzig
        42 !> quarante-trois
        42 !> 四十三
        7 !> eight
        7 <!> 7th
        7 <!> 7 th
        third <!> fourth
        3rd <!> 3
        first <!> last
        """,
    "counting and change": r"""
        5 loss <!> 5
        a loss of 5 <!> 5
        a loss of $5 <!> a gain of $5
        5% increase <!> 5% decrease
        increase of 5% <!> decrease of 5%
        increased by 5\% <!> decreased by 5\%
        5\% \text{ increase} <=> 5\%
        twice as large <!> half as large
        3 times <!> 1/3
        3 times larger <!> 3 times smaller
        5 more <=> 5
        5 more <!> 5 less
        5 left <=> 5
        5 years old <=> 5
        5 years old <=> 5 years
        5 km east <!> 5 km south
        5 above zero <!> 5 below zero
        5 pairs of shoes <!> 5 shoes
        2 remainder 3 <!> 2
        2 remainder 3 <!> 3
        2 remainder 3 <=> 2 r 3
        2 R3 <!> 3 R2
        5 ± 0.1 <!> 5
        5 \pm 0.1 <=> 5 ± 0.1
        5 or 6 <!> 5
        5 to 6 <!> 5
        5-6 <!> 5
        5–6 <!> -1
        about 5 <=> 5
        approximately 5 <=> 5
        ≈ 5 <=> 5
        \approx 5 <=> 5
        ~5 <=> 5
        5.0 approx <=> 5
        roughly 5.2 <=> 5.2
        5 dollars and 25 cents <=> $5.25
        5 feet 6 inches <=> 66 inches
        5 feet 6 inches <=> 5'6"
        5 feet 6 inches <!> 5.6 feet
        5 lb 8 oz <=> 5.5 lb
        5 lb 8 oz <!> 5.8 lb
        3 m 50 cm <=> 3.5 m
        3 m 50 cm <!> 3.05 m
        1 km 200 m <=> 1200 m
        """,
    "calculus and functions": r"""
        \ln 2 <=> ln 2
        \ln 2 <=> ln(2)
        \ln 2 <!> \ln 3
        \ln 2 <!> 2
        \log_2 8 <=> 3
        \log_2 8 <!> 8
        \log_{10} 100 <=> 2
        e^2 <=> \exp(2)
        e^2 <!> 2e
        e^{-x} <=> \frac{1}{e^x}
        x^2 + C <=> C + x^2
        \frac{x^3}{3} + C <=> \frac13 x^3 + C
        \frac{x^3}{3} + C <!> \frac{x^3}{2} + C
        \ln|x| + C <=> \ln |x| + C
        2x e^{x^2} <=> 2xe^{x^2}
        \int_0^1 x dx <=> 1/2
        \sum_{k=1}^{3} k <=> 6
        \binom{6}{2} <=> 15
        \binom{6}{2} <!> \binom{6}{3}
        5! <=> 120
        5! <!> 5
        2^{10} <=> 1024
        2^{10} <!> 210
        2^{10} <!> 20
        2^{10} <=> 2^10
        2^{100} <!> 2^{99}
        \infty <=> infinity
        \infty <!> -\infty
        does not exist <=> DNE
        does not exist <!> exists
        undefined <=> Undefined
        undefined <!> 0
        O(n^2) <!> O(n)
        O(n\log n) <=> O(n log n)
        \max(a, b) <!> \min(a, b)
        |x - 3| <=> |3 - x|
        |x - 3| <!> x - 3
        \lfloor 3.7 \rfloor <=> 3
        \lceil 3.2 \rceil <=> 4
        \lfloor x \rfloor <!> \lceil x \rceil
        f'(x) <!> f(x)
        \nabla f <!> f
        p \land q <!> p \lor q
        p \to q <!> q \to p
        \neg p <!> p
        a \mid b <!> b \mid a
        A \cup B <!> A \cap B
        A \subset B <!> B \subset A
        """,
}  # fmt: skip
