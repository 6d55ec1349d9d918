-- What both databases are made of; all of it is temporary. Every value follows from a row's number alone, so that
-- two runs at one scale measure the same data. psql's variable `scale` is 1 for a little over 1 GB of COPY text.

CREATE FUNCTION pg_temp.pick(number bigint, seed bigint, choices bigint) RETURNS bigint
    LANGUAGE sql IMMUTABLE
    RETURN (hashint8extended(number, seed) & 9223372036854775807) % choices;

CREATE FUNCTION pg_temp.moment(number bigint, seed bigint) RETURNS timestamptz
    LANGUAGE sql IMMUTABLE
    RETURN timestamptz '2023-01-01 00:00:00+00' + (pg_temp.pick(number, seed, 94608000000000) * interval '1 microsecond');

CREATE TEMPORARY TABLE word AS
SELECT (row_number() OVER () - 1)::int AS id, word
FROM regexp_split_to_table(
    'about above account across action after again agree allow already although always amount answer appear apply '
    'arrive article ask assume attempt available average avoid balance basic because become before begin behind believe '
    'benefit better between beyond border borrow bottle bottom branch bread bridge bright broken budget build burden '
    'business button camera campaign cancel capital carbon careful carry castle catalogue caught centre century certain '
    'chain chair change charge cheap choose circle citizen city claim class clean clear client climb clock close cloth '
    'coast coffee collect colour column combine comfort common company compare complete concern condition confirm connect '
    'consider contain content continue contract control copper corner correct cost count country couple course cover '
    'create credit cross crowd current custom damage danger dealer debate decade decide deliver demand depend describe '
    'desert design detail develop device differ dinner direct discount discuss distance divide doctor document double '
    'doubt drawer dream drive during eager early earth easy economy edge effect effort either electric eleven empty '
    'energy engine enjoy enough enter entire equal error estate evening event every evidence exact example except '
    'exchange expect explain extra fabric factor fair family famous farmer father feature fellow field figure final '
    'finger finish firm follow foreign forest forget formal fortune forward freight fresh friend front fruit future '
    'garden gather general gentle glass global golden govern grain grand great ground group growth guess guide habit '
    'handle happen harbour hardly heavy height hidden history holiday honest hospital hotel hour house human hundred '
    'Zürich café naïve façade Århus jalapeño Łódź smörgåsbord', ' ') AS word;

CREATE TEMPORARY TABLE phrase AS
SELECT number::int AS id, string_agg(word.word, ' ' ORDER BY place) AS text
FROM generate_series(0, 29999) AS number
CROSS JOIN LATERAL generate_series(1, 5 + pg_temp.pick(number, 1, 8)) AS place
JOIN word ON word.id = pg_temp.pick(number * 16 + place, 2, (SELECT count(*) FROM word))
GROUP BY number;
ALTER TABLE phrase ADD PRIMARY KEY (id);
ANALYZE word, phrase;
