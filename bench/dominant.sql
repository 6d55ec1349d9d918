-- One table that is nearly all of the database: nothing to gain from dumping tables side by side.

CREATE TABLE country (code char(2) PRIMARY KEY, name text NOT NULL);
INSERT INTO country
SELECT chr(65 + number / 16) || chr(65 + number % 16), initcap(word.word) || ' ' || number
FROM generate_series(0, 239) AS number JOIN word ON word.id = number;

CREATE TABLE device (id int PRIMARY KEY, name text NOT NULL, country char(2) NOT NULL);
INSERT INTO device
SELECT number, phrase.text, chr(65 + pg_temp.pick(number, 6, 15)::int) || chr(65 + pg_temp.pick(number, 7, 16)::int)
FROM generate_series(1, 5000) AS number JOIN phrase ON phrase.id = pg_temp.pick(number, 1, 30000);

CREATE TABLE history (
    id bigint NOT NULL, device_id int NOT NULL, recorded_at timestamptz NOT NULL, digest text NOT NULL,
    value numeric(14, 4) NOT NULL, message text, details jsonb NOT NULL);
INSERT INTO history
SELECT number, 1 + pg_temp.pick(number, 2, 5000), timestamptz '2024-01-01 00:00:00+00' + number * interval '0.731 seconds',
    md5(number::text), pg_temp.pick(number, 3, 1000000000) / 10000.0,
    CASE WHEN number % 7 > 0 THEN phrase.text END,
    jsonb_build_object('level', (ARRAY['debug', 'info', 'warning', 'error'])[1 + pg_temp.pick(number, 4, 4)],
        'milliseconds', pg_temp.pick(number, 5, 60000), 'host', 'node-' || pg_temp.pick(number, 8, 64))
FROM generate_series(1, (5150000 * :scale)::bigint) AS number
JOIN phrase ON phrase.id = pg_temp.pick(number, 9, 30000);

ALTER TABLE device ADD FOREIGN KEY (country) REFERENCES country;
ALTER TABLE history ADD PRIMARY KEY (id), ADD FOREIGN KEY (device_id) REFERENCES device;
CREATE INDEX ON history (device_id, recorded_at);
