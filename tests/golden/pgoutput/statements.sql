-- Every kind of message that a capture meets, each statement in its own transaction unless it begins one.
insert into item values
    (1, 'first', 1.50, '2001-02-03', '2001-02-03 04:05:06.7+00', '{1,2}', '\x00ff', true, 0.1, null),
    (2, 'Grüße', 'NaN', 'infinity', '-infinity', '{}', '\x', false, 'NaN', null),
    (3, null, null, null, null, null, null, null, null, null);
insert into item (id, name, big) select 4, 'large', string_agg(md5(g::text), '' order by g) from generate_series(1, 100) g;
update item set name = 'touched, its large value is not sent' where id = 4;
update item set id = 40 where id = 1;
update item set name = null, price = -0.01, born = '0044-03-15 BC', tags = '[0:1]={7,8}' where id = 2;
delete from item where id = 3;
insert into whole values ('a', 1.00, '2020-02-29'), ('b', 'NaN', 'infinity'), ('c', null, null);
update whole set amount = 2.00 where id = 'a';
update whole set id = 'z', day = null where id = 'b';
delete from whole where id = 'c';
begin;
insert into item (id, name) values (5, 'of one transaction');
insert into whole values ('d', 5.00, '2021-01-01');
update item set name = 'again' where id = 5;
savepoint s;
delete from item where id = 5;
rollback to s;
commit;
alter table item add column added int default 7;
insert into item (id, name) values (6, 'in another shape');
truncate other;
insert into other values (1);
insert into passed_over values (1);
begin;
insert into other select g from generate_series(10, 109) g;
savepoint s;
insert into other select g from generate_series(1000, 1449) g;
rollback to s;
insert into other select g from generate_series(2000, 2049) g;
commit;
